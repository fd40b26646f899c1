"""Makes the bundled demo: `python -m scripts.train_demo --out multilora/demo` (about half an hour on one core)."""
