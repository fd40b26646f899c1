"""Ranks that compute one model together: what a group of them can do, and how widths are divided among them."""
