"""Four adapters on SmolLM2-135M-Instruct: corpora made by code, training with PEFT, evaluation through the engine.

`python -m scripts.train_smollm2 --help` says how.
"""
