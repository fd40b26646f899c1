"""GPUs by name: memory, and what they read, multiply and are sent in a second.

H200's numbers are medians of what `bench/gpu` measured on several machines. The others are NVIDIA's data sheets,
times what the H200 reached of its own: nobody has measured multilora there."""

from dataclasses import dataclass

from multilora.errors import ConfigError

GIB = 1 << 30
READ_REACHED = 4.31 / 4.8  # of the data sheet's bandwidth, by the H200
MATMUL_REACHED = 782 / 989  # of the data sheet's dense bf16 arithmetic


@dataclass(frozen=True)
class GpuModel:
    """One kind. memory: bytes that PyTorch sees; read: bytes/s; matmul: bf16 operations/s; link: bytes/s from pinned
    host memory; measured: by `bench/gpu`, not taken from a data sheet."""

    name: str
    memory: int
    read: float
    matmul: float
    link: float
    measured: bool = False


def _from_data_sheet(name: str, gib: float, read_tb: float, matmul_tflop: float, link_gb: float) -> GpuModel:
    return GpuModel(
        name, int(gib * GIB), read_tb * READ_REACHED * 1e12, matmul_tflop * MATMUL_REACHED * 1e12, link_gb * 1e9
    )


GPUS: dict[str, GpuModel] = {
    gpu.name: gpu
    for gpu in (
        GpuModel("h200", int(139.8 * GIB), 4.31e12, 782e12, 55.1e9, measured=True),
        _from_data_sheet("h100", 79.2, 3.35, 989, 55),
        _from_data_sheet("h100-pcie", 79.2, 2.0, 756, 55),
        _from_data_sheet("a100-80g", 79.2, 2.039, 312, 25),
        _from_data_sheet("a100-40g", 39.4, 1.555, 312, 25),
        _from_data_sheet("l40s", 44.4, 0.864, 362, 25),
        _from_data_sheet("l4", 22.2, 0.3, 121, 25),
        _from_data_sheet("a10g", 22.1, 0.6, 70, 25),
        _from_data_sheet("rtx-4090", 23.5, 1.008, 165, 25),
    )
}


def gpu_model(name: str) -> GpuModel:
    """The GPU of this name, in any case. Raises ConfigError."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu {name} is not known; there are: {', '.join(GPUS)}")
    return found
