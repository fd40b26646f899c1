"""What is wrong on this machine, and what will be slow, from the facts alone. Called by `command.py`."""

from collections.abc import Iterator
from dataclasses import dataclass

from multilora.adapters.host.staging import STAGING_BYTES
from multilora.cli.doctor.devices import AutoChoices, Devices
from multilora.cli.doctor.host import HostFacts
from multilora.cli.doctor.packages import InstalledPackage, InstalledPackages

STAGING_SHARE = 4
FEW_DESCRIPTORS = 4096
LITTLE_SHARED_MEMORY = 256 << 20  # an adapter of rank 16 of an 8B model is 84 MB
LITTLE_DISK = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing to know. problem: a server cannot run, or not with this GPU; else it runs, perhaps slower."""

    problem: bool
    what: str
    remedy: str


def find(packages: InstalledPackages, devices: Devices, choices: AutoChoices, host: HostFacts) -> list[Finding]:
    """Everything that is worth saying, problems first."""
    found = [*_packages(packages, devices), *_gpus(devices), *_kernels(devices, choices, host), *_host(host)]
    return sorted(found, key=lambda finding: not finding.problem)


def _packages(packages: InstalledPackages, devices: Devices) -> Iterator[Finding]:
    if not packages.listed:
        yield Finding(False, "multilora runs from its source, so what it asks for is not known", "pip install -e .")
    for package in packages.core:
        if not package.fits:
            yield _unfit(package, problem=True, target=f"'{package.name}{package.wanted}'")
    for extra, members in packages.extras.items():
        for package in members:
            if package.version is not None and not package.fits:
                yield _unfit(package, problem=False, target=f"'multilora[{extra}]'")
    missing = [p.name for p in packages.extras.get("gpu", ()) if p.version is None]
    if devices.gpus and missing:
        yield Finding(
            False,
            f"{', '.join(missing)} is not installed: prompts go through Triton kernels of ours, not FlashInfer's",
            "pip install 'multilora[gpu]'",
        )


def _unfit(package: InstalledPackage, *, problem: bool, target: str) -> Finding:
    if package.version is None:
        what = f"{package.name} is not installed"
    else:
        what = f"{package.name} {package.version} is too old, {package.wanted} is needed"
    return Finding(problem, what, f"pip install --upgrade {target}")


def _gpus(devices: Devices) -> Iterator[Finding]:
    if not devices.gpus:
        if devices.driver and devices.cuda_build is None:
            yield Finding(
                True,
                "there is an NVIDIA driver, but this PyTorch is a build for CPUs",
                "install PyTorch's CUDA build (https://pytorch.org/get-started/locally)",
            )
        elif devices.driver:
            yield Finding(
                True,
                f"there is an NVIDIA driver, but PyTorch (CUDA {devices.cuda_build}) finds no GPU",
                "check CUDA_VISIBLE_DEVICES, the container's access to the GPU, and whether the driver is new enough",
            )
        else:
            yield Finding(
                False,
                "no GPU: everything is computed in float32 on the CPU, each token by reading all weights from memory",
                "fine for the bundled model and up to about 1 B parameters; beyond, use a CUDA GPU",
            )
    for index, gpu in enumerate(devices.gpus):
        if not gpu.compiled:
            major, minor = gpu.capability
            yield Finding(
                True,
                f"GPU {index}, {gpu.name}: PyTorch has no code for compute capability {major}.{minor}",
                "install a PyTorch build that has (https://pytorch.org/get-started/locally)",
            )
        if not gpu.has_bfloat16:
            yield Finding(False, f"GPU {index}, {gpu.name}, has no fast bfloat16", "start with --dtype float16")
        if gpu.free_bytes < gpu.total_bytes * 0.8:
            yield Finding(
                False,
                f"GPU {index}, {gpu.name}: others hold {(gpu.total_bytes - gpu.free_bytes) / 2**30:.1f} GiB of it",
                "nvidia-smi shows who; the arena gets that much less",
            )
    if devices.unlinked:
        pairs = ", ".join(f"{a}-{b}" for a, b in devices.unlinked)
        yield Finding(
            False,
            f"GPUs {pairs} cannot read each other's memory: --tp-size goes through the host",
            "choose GPUs joined by NVLink with CUDA_VISIBLE_DEVICES",
        )


def _kernels(devices: Devices, choices: AutoChoices, host: HostFacts) -> Iterator[Finding]:
    if not devices.gpus:
        return
    if choices.attention == "torch":
        yield Finding(
            False,
            f"attention of {choices.model} is PyTorch's, several times slower: {choices.obstacle}",
            "--dtype bfloat16 if that is the reason; else it cannot be changed",
        )
    elif choices.obstacle and "not installed" not in choices.obstacle:
        yield Finding(
            False,
            f"prompts of {choices.model} go through Triton kernels of ours: {choices.obstacle}",
            "--dtype bfloat16 if that is the reason; else nothing: decodes take the same kernels with both",
        )
    if choices.lora != "csgmv":
        yield Finding(
            False,
            f"adapters of {choices.model} are computed by plain PyTorch: they are packed in another dtype",
            "--dtype bfloat16",
        )
    if host.compiler is None:
        yield Finding(True, "no C compiler: Triton cannot build its launchers", "apt install gcc, or set CC")
    if host.nvcc is None and choices.attention == "flashinfer":
        yield Finding(
            False,
            "no nvcc: unless FlashInfer's kernels are compiled already, prompts stay with Triton's",
            "install the CUDA toolkit, or the package flashinfer-cubin with flashinfer-jit-cache",
        )
    for cache in host.caches:
        if cache.kept.startswith("kernels") and not cache.used:
            yield Finding(
                False,
                f"{cache.path} is empty: the first start compiles the {cache.kept}, which takes a minute or more",
                "start once; in a container, keep this folder on a volume",
            )


def _host(host: HostFacts) -> Iterator[Finding]:
    for cache in host.caches:
        if not cache.writable:
            yield Finding(True, f"{cache.path} ({cache.kept}) cannot be written", "mount a volume there, or set HOME")
        elif cache.free < LITTLE_DISK:
            yield Finding(
                False,
                f"{cache.free / 2**30:.1f} GiB are left on the disk of {cache.path} ({cache.kept})",
                "make room",
            )
    if host.spare is not None and host.spare < STAGING_SHARE * STAGING_BYTES:
        yield Finding(
            False,
            f"{host.spare / 2**30:.1f} GiB of memory are left: adapters are loaded without staging memory, slower",
            f"leave the process {STAGING_SHARE * STAGING_BYTES >> 30} GiB beside what adapters take",
        )
    if host.shared_free is None or host.shared_free < LITTLE_SHARED_MEMORY:
        left = "is not there" if host.shared_free is None else f"has {host.shared_free / 2**20:.0f} MiB left"
        yield Finding(
            False, f"/dev/shm {left}: a trainer cannot hand over adapters there", "docker run --shm-size 8g"
        )
    if host.descriptors is not None and host.descriptors < FEW_DESCRIPTORS:
        yield Finding(
            False,
            f"at most {host.descriptors} file descriptors: that bounds the connections",
            "raise the hard limit: ulimit -Hn, LimitNOFILE= in a unit, --ulimit nofile= of a container",
        )
    if host.cores < 4:
        yield Finding(
            False,
            f"{host.cores} cores: HTTP, tokenizing, loading of adapters and the engine share them",
            "4 or more, 16 for one large GPU",
        )
