"""What all Triton kernels share: how they are launched, and small mathematical functions."""
