"""Products with weights of 4 bits, in Llama-3.1-8B's four shapes: packed, dequantised first, and with bf16 weights.

    python -m bench.int4_matmul [--group 128] [--cut 1] [--out FILE]

Rows 1 to 512. Copies of a weight are taken in turns, so that none lies in a cache. The limit is reading the packed
weight once. "switch" is the largest number of rows up to which the packed product is faster, in the sum of the
shapes: what `PRODUCT_ROWS` of `layers/weights/int4_arithmetic.py` should be. cut: divides the shapes, to try it on a
CPU. The last line is one JSON.
"""

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from bench.common import environment, finish, read_bandwidth, say
from bench.sampling_kernels import Timer
from multilora.layers.matmul import linear
from multilora.layers.weights import int4_arithmetic as arithmetic

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BEYOND_CACHES = 256 << 20  # bytes of all copies of a packed weight
REPEATS = 10
Multiply = Callable[[int], torch.Tensor]
"""With the copy of this number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = read_bandwidth(device)
    result = environment("triton") | {
        "bytes_per_second": bandwidth,
        "group": args.group,
        "cut": args.cut,
        "shapes": {},
    }
    for name, (outs, width) in SHAPES.items():
        result["shapes"][name] = measure(name, outs // args.cut, width // args.cut, args.group, device, bandwidth)
    result["switch"] = switch(list(result["shapes"].values()))
    say(f"packed products are faster up to {result['switch']} rows; PRODUCT_ROWS is {arithmetic.PRODUCT_ROWS}")
    finish(result, args.out)


def measure(
    name: str, outs: int, width: int, group: int, device: torch.device, bandwidth: float
) -> dict[int, dict[str, float]]:
    """Milliseconds by rows and way."""
    generator = torch.Generator(device).manual_seed(0)
    scales = torch.rand(width // group, outs, 2, generator=generator, device=device).bfloat16()
    numbers = torch.randint(0, 16, (outs, width), generator=generator, device=device, dtype=torch.int32)
    packed = arithmetic.pack(numbers)
    count = max(1, BEYOND_CACHES // packed.nbytes) if device.type == "cuda" else 1
    copies = [packed.clone() for _ in range(count)]
    plain = [arithmetic.dequantise(packed, group, scales) for _ in range(max(1, count // 4))]
    limit = (packed.nbytes + scales.nbytes) / bandwidth * 1e3
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, width, generator=generator, device=device).bfloat16()
        ways: dict[str, Multiply] = {
            "packed": lambda i, x=x: arithmetic.packed_product(x, copies[i % count], group, scales),
            "dequantised": lambda i, x=x: linear(x, arithmetic.dequantise(copies[i % count], group, scales)),
            "bf16": lambda i, x=x: linear(x, plain[i % len(plain)]),
        }
        found[rows] = {way: milliseconds(run, device) for way, run in ways.items()}
        text = "  ".join(f"{way} {ms:8.4f}" for way, ms in found[rows].items())
        say(f"{name:<8} [{outs}, {width}] {rows:4d} rows  {text} ms  limit {limit:.4f}")
    return found


def milliseconds(run: Multiply, device: torch.device) -> float:
    """The median of one product."""
    times = []
    for repeat in range(REPEATS + 2):
        timer = Timer(device)
        run(repeat)
        times.append(timer.done())
    return median(times[2:])


def switch(shapes: Sequence[dict[int, dict[str, float]]]) -> int:
    """The largest number of rows up to which packed products take less time than dequantising first; 0: none."""
    best = 0
    for rows in ROWS:
        total: dict[str, Any] = {way: sum(shape[rows][way] for shape in shapes) for way in ("packed", "dequantised")}
        if total["packed"] > total["dequantised"]:
            break
        best = rows
    return best


if __name__ == "__main__":
    main()
