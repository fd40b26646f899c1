"""Text and names: tokenizer, chat template, streaming detokenizer, stop strings, adapter registry."""
