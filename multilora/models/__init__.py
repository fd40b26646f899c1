"""Model families in plain PyTorch, one readable file each, and how weights get into them."""
