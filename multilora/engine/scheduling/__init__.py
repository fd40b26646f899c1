"""Which requests run in the next step, and how far."""
