"""From a plan to tensors, through the model, to sampled tokens."""
