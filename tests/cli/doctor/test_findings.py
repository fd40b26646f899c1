"""From facts to findings: each has a state of the machine in which it is said, and is silent otherwise."""

from dataclasses import replace

import pytest

from multilora.cli.doctor.devices import AutoChoices, Devices, Gpu
from multilora.cli.doctor.findings import find
from multilora.cli.doctor.host import CacheFolder, HostFacts
from multilora.cli.doctor.packages import InstalledPackage, InstalledPackages

GPU = Gpu("NVIDIA H200", (9, 0), 132, 140 << 30, 139 << 30, True)
DEVICES = Devices("13.0", True, [GPU], [])
PACKAGES = InstalledPackages(
    True,
    [InstalledPackage("torch", ">=2.11", "2.13.0")],
    {"gpu": [InstalledPackage("flashinfer-python", ">=0.7", "0.7.1")]},
)
CHOICES = AutoChoices("a model", "cuda", "bfloat16", "flashinfer", "csgmv", True, None)
CACHE = CacheFolder("kernels of Triton", "/cache", True, True, 1, 100 << 30)
HOST = HostFacts(16, None, 100 << 30, 64 << 30, 64 << 30, 65536, "/usr/bin/gcc", "/usr/bin/nvcc", [CACHE])


def said(packages=PACKAGES, devices=DEVICES, choices=CHOICES, host=HOST):
    return [(finding.problem, finding.what) for finding in find(packages, devices, choices, host)]


def test_a_good_machine_has_none():
    assert said() == []


@pytest.mark.parametrize(
    ("devices", "problem", "words"),
    [
        (Devices(None, False, [], []), False, "no GPU"),
        (Devices(None, True, [], []), True, "a build for CPUs"),
        (Devices("13.0", True, [], []), True, "finds no GPU"),
        (replace(DEVICES, gpus=[replace(GPU, compiled=False)]), True, "no code for compute capability 9.0"),
        (replace(DEVICES, gpus=[replace(GPU, capability=(7, 5))]), False, "no fast bfloat16"),
        (replace(DEVICES, gpus=[replace(GPU, free_bytes=70 << 30)]), False, "others hold 70.0 GiB"),
        (replace(DEVICES, gpus=[GPU, GPU], unlinked=[(0, 1)]), False, "GPUs 0-1"),
    ],
)
def test_devices(devices, problem, words):
    [(is_problem, what)] = said(devices=devices)
    assert is_problem is problem and words in what


@pytest.mark.parametrize(
    ("changes", "problem", "words"),
    [
        ({"compiler": None}, True, "no C compiler"),
        ({"nvcc": None}, False, "no nvcc"),
        ({"caches": [replace(CACHE, used=0)]}, False, "the first start compiles the kernels of Triton"),
        ({"caches": [replace(CACHE, writable=False)]}, True, "cannot be written"),
        ({"caches": [replace(CACHE, free=1 << 30)]}, False, "1.0 GiB are left on the disk"),
        ({"spare": 1 << 30}, False, "without staging memory"),
        ({"shared_free": 64 << 20}, False, "/dev/shm has 64 MiB left"),
        ({"shared_free": None}, False, "/dev/shm is not there"),
        ({"descriptors": 1024}, False, "at most 1024 file descriptors"),
        ({"cores": 2}, False, "2 cores"),
    ],
)
def test_host(changes, problem, words):
    [(is_problem, what)] = said(host=replace(HOST, **changes))
    assert is_problem is problem and words in what


def test_packages_and_choices():
    old = replace(
        PACKAGES, core=[InstalledPackage("torch", ">=2.11", "2.3.0"), InstalledPackage("msgspec", "", None)]
    )
    assert said(packages=old) == [
        (True, "torch 2.3.0 is too old, >=2.11 is needed"),
        (True, "msgspec is not installed"),
    ]
    bare = replace(PACKAGES, extras={"gpu": [InstalledPackage("flashinfer-python", ">=0.7", None)]})
    [(problem, what)] = said(packages=bare)
    assert not problem and "flashinfer-python is not installed" in what
    [(problem, what)] = said(packages=replace(PACKAGES, listed=False))
    assert not problem and "from its source" in what
    odd = "not flashinfer: it takes head_dim 64, 128 and 256, the model has 80"
    assert said(choices=replace(CHOICES, attention="triton", obstacle=odd))[0][1].endswith(
        f"Triton kernels of ours: {odd}"
    )
    assert said(choices=replace(CHOICES, attention="triton", obstacle="not flashinfer: it is not installed")) == []
    slow = f"{odd}; not triton: the package triton is not installed"
    assert said(choices=replace(CHOICES, attention="torch", obstacle=slow))[0][1].endswith(f"slower: {slow}")
    [(problem, what)] = said(choices=replace(CHOICES, lora="torch"))
    assert not problem and "plain PyTorch" in what
    stale = replace(PACKAGES, extras={"gguf": [InstalledPackage("gguf", ">=0.17", "0.1")]})
    assert said(packages=stale) == [(False, "gguf 0.1 is too old, >=0.17 is needed")]
