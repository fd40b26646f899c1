"""Whose keys and values may serve whom, where requests use adapters and compositions of them."""
