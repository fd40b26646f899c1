"""LoRA arithmetic: what one step adds to a linear layer. It knows pages, not where adapters come from."""
