"""What PEFT saved: its files read, checked, and held against the base model."""
