"""What a GPU would serve, before there is one: memory by the engine's own plan, time by a calibrated step-cost
model."""
