"""LoRA arithmetic: what one step adds to a linear layer. Knows pages, not where adapters come from."""
