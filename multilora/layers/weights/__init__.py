"""How the weights of linear layers are stored and multiplied with: one file and one line of `methods.py` a format."""
