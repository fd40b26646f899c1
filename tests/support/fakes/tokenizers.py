"""Two tiny tokenizers for tests, one of each kind in use: byte-level BPE, and metaspace with byte fallback.

Made in a moment, nothing is downloaded. Used by this package's tests and by anyone who tests against it.
"""

import copy

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from multilora.front.tokenizer import Tokenizer

SPECIALS = ["<s>", "</s>", "<|im|>"]  # ids 0, 1, 2: BOS, EOS, another

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant: {% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: every byte is in the vocabulary, a character may be several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    corpus = ["the cat and the dog, the 日本 and the 日本語 and 🙂🙃 then\n\nthe end. naïve é xyz日 xyz日\n"] * 4
    backend.train_from_iterator(corpus, trainer)
    return _wrap(backend)


def metaspace_tokenizer() -> Tokenizer:
    """As Llama 2's and Mistral's: spaces are "▁", what is not in the vocabulary is UTF-8 bytes such as <0xE6>."""
    letters = ["▁", *"abcdehnot.,", "é"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁"), ("a", "t")]
    pieces = [*SPECIALS, "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIALS)
    return _wrap(backend)


def _wrap(backend: Backend) -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|im|>"]
    )
    hf.chat_template = CHAT_TEMPLATE
    return Tokenizer(hf)


def with_added_tokens(tokenizer: Tokenizer, *tokens: str, eos: str | None = None) -> Tokenizer:
    """A copy with more tokens behind the others, as PEFT's users add them; the last of them may be another EOS."""
    hf = copy.deepcopy(tokenizer.hf)
    hf.add_tokens(list(tokens))
    if eos is not None:
        hf.add_special_tokens({"eos_token": eos})
    return Tokenizer(hf)
