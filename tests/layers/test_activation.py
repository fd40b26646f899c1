"""Which half is the gate."""

import torch

from multilora.layers.activation import SiluAndMul


def test_gate_comes_first() -> None:
    got = SiluAndMul()(torch.tensor([[0.0, 1.0, 5.0, 3.0]]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 3.0 / (1.0 + torch.e**-1)]]))
