"""Makes the bundled demo: `python -m scripts.train_demo --out multilora/demo` (about 20 minutes on one core)."""
