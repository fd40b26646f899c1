"""Building blocks of the models. LoRA enters at exactly one place, `linear.py`."""
