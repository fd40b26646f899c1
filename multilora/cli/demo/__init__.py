"""`multilora demo`: the real server on the bundled model, and the documentation's LoRA examples against it."""
