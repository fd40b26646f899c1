"""The other ranks of a tensor-parallel engine: what rank 0 sends them, how they follow, and how all of them end."""
