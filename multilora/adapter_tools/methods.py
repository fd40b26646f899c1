"""The names of PEFT's ways to combine adapters. The command line shows them, so this file imports no heavy library.

`combinations.py` computes them.
"""

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", *ON_FACTORS, *ON_PRODUCTS)
SPARSE = tuple(method for method in METHODS if method not in ("cat", "linear", "svd"))
"""The methods that need a density."""
RANDOM = tuple(method for method in METHODS if method.startswith("dare"))
