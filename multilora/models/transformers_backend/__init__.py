"""Any causal LM that transformers can build: its own tree, with our linear layers, attention, embedding and head."""
