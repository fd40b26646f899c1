"""The GPUs as PyTorch sees them, and what `auto` would choose for a model on them. Called by `command.py`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from multilora.attention.backends import auto_attention, why_not
from multilora.attention.base import AttentionShape
from multilora.lora.backends import auto_backend
from multilora.models.load import make_model

LLAMA = AttentionShape(32, 8, 128, 128**-0.5, None)
"""What backends are chosen for if no model is given: the attention of Llama-3.1-8B."""
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. capability: (9, 0) for Hopper; compiled: PyTorch was built for it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int
    free_bytes: int
    compiled: bool

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        return self.capability >= (8, 9)


@dataclass(frozen=True)
class Devices:
    """cuda_build: PyTorch's CUDA version, None for a CPU build; driver: whether NVIDIA's kernel driver is loaded;
    unlinked: pairs of GPUs that cannot read each other's memory."""

    cuda_build: str | None
    driver: bool
    gpus: list[Gpu]
    unlinked: list[tuple[int, int]]


@dataclass(frozen=True)
class AutoChoices:
    """What `auto` means here for one model. model: its path, or words for the one that is assumed; obstacle: what
    keeps faster attention away, as the log of a start says it; None: nothing does."""

    model: str
    device: str
    dtype: str
    attention: str
    lora: str
    cuda_graphs: bool
    obstacle: str | None


def find_devices() -> Devices:
    """Look at every device. Starts CUDA."""
    if not torch.cuda.is_available():
        return Devices(torch.version.cuda, DRIVER.exists(), [], [])
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    unlinked = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return Devices(torch.version.cuda, True, [_gpu(i) for i in range(count)], unlinked)


def auto_choices(model_path: str | None, gpu: Gpu | None) -> AutoChoices:
    """The backends for a model on this GPU, or on the CPU. Reads the model's config only. Raises ConfigError,
    ModelUnsupported."""
    device = torch.device("cpu" if gpu is None else "cuda")
    if model_path is None:
        name, shape, capturable = "a Llama of head_dim 128", LLAMA, True
        dtype = torch.float32 if gpu is None else torch.bfloat16 if gpu.has_bfloat16 else torch.float16
        kv_dtype = adapter_dtype = dtype
    else:
        model = make_model(model_path, dtype="float32" if gpu is None else "auto", device=torch.device("meta"))
        name, shape, capturable = model_path, model.attention_shape, model.capturable
        dtype, kv_dtype = model.config.dtype, model.config.kv_dtype
        adapter_dtype = model.config.adapter_dtype
    attention, passed = auto_attention(device, dtype, kv_dtype, shape)
    return AutoChoices(
        model=name,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        lora=auto_backend(device.type, adapter_dtype, dtype),
        cuda_graphs=gpu is not None and attention != "torch" and capturable,
        obstacle=why_not(passed) or None,
    )


def _gpu(index: int) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (facts.major, facts.minor)
    return Gpu(facts.name, capability, facts.multi_processor_count, total, free, _compiled(capability))


def _compiled(capability: tuple[int, int]) -> bool:
    """Whether PyTorch has machine code of the same major version and no later minor one, or PTX for an earlier."""
    major, minor = capability
    for arch in torch.cuda.get_arch_list():
        kind, _, digits = arch.partition("_")
        number = int("".join(c for c in digits if c.isdigit()) or 0)
        built = divmod(number, 10)
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return False
