"""Runs `multilora doctor`: collects the facts, writes them as text or JSON. Called by `__main__.py`."""

import dataclasses
import json
import platform
import sys
from typing import Any

from multilora import __version__
from multilora.cli.doctor.args import DoctorArgs
from multilora.cli.doctor.devices import AutoChoices, Devices, auto_choices, find_devices
from multilora.cli.doctor.findings import Finding, find
from multilora.cli.doctor.host import HostFacts, host_facts
from multilora.cli.doctor.packages import InstalledPackages, installed_packages
from multilora.memory.plan import format_bytes


def run(args: DoctorArgs) -> int:
    """Write what there is to say and return the exit code: 1 if there is a problem. Raises ConfigError and
    ModelUnsupported for a bad model."""
    packages, devices, host = installed_packages(), find_devices(), host_facts()
    choices = auto_choices(args.model_path, devices.gpus[0] if devices.gpus else None)
    findings = find(packages, devices, choices, host)
    ok = not any(finding.problem for finding in findings)
    if args.json:
        facts: dict[str, Any] = {"ok": ok, "version": __version__, "python": platform.python_version()}
        for name, part in (("packages", packages), ("devices", devices), ("auto", choices), ("host", host)):
            facts[name] = dataclasses.asdict(part)
        facts["findings"] = [dataclasses.asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_text(packages, devices, choices, host, findings)) + "\n")
    return 0 if ok else 1


def _text(
    packages: InstalledPackages,
    devices: Devices,
    choices: AutoChoices,
    host: HostFacts,
    findings: list[Finding],
) -> list[str]:
    lines = [f"multilora {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    for part in (_packages(packages), _devices(devices, choices), _host(host)):
        lines += [f"  {name:<10} {text}" for name, text in part] + [""]
    for finding in findings:
        lines += [f"{'PROBLEM' if finding.problem else 'note'}: {finding.what}", f"  {finding.remedy}"]
    if not any(finding.problem for finding in findings):
        lines.append("a server can run here")
    return lines


def _packages(packages: InstalledPackages) -> list[tuple[str, str]]:
    rows = [("packages", ", ".join(f"{p.name} {p.version or 'MISSING'}" for p in packages.core) or "not known")]
    for extra, members in packages.extras.items():
        rows.append((f"[{extra}]", ", ".join(f"{p.name} {p.version or 'not installed'}" for p in members)))
    return rows


def _devices(devices: Devices, choices: AutoChoices) -> list[tuple[str, str]]:
    cuda = "CPU build" if devices.cuda_build is None else f"CUDA {devices.cuda_build}"
    rows = [("PyTorch", cuda)]
    for index, gpu in enumerate(devices.gpus):
        able = [name for name, has in (("bfloat16", gpu.has_bfloat16), ("fp8", gpu.has_fp8)) if has]
        rows.append(
            (
                f"GPU {index}",
                f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.multiprocessors} "
                f"multiprocessors, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free, "
                f"{' and '.join(able) or 'neither bfloat16 nor fp8'}",
            )
        )
    if not devices.gpus:
        rows.append(("GPU", "none"))
    graphs = "CUDA graphs" if choices.cuda_graphs else "no CUDA graphs"
    chosen = f"attention {choices.attention}, LoRA {choices.lora}, {graphs}"
    rows.append(("auto", f"for {choices.model} in {choices.dtype} on {choices.device}: {chosen}"))
    return rows


def _host(host: HostFacts) -> list[tuple[str, str]]:
    def size(count: int | None) -> str:
        return "unknown" if count is None else format_bytes(count)

    rows = [
        ("cores", f"{host.cores}, OMP_NUM_THREADS {host.threads or 'not set'}"),
        ("memory", f"{size(host.spare)} left, /dev/shm {size(host.shared_free)} of {size(host.shared_total)} free"),
        ("files", f"{host.descriptors or 'any number of'} descriptors"),
        ("compilers", f"{host.compiler or 'no C compiler'}, {host.nvcc or 'no nvcc'}"),
    ]
    for cache in host.caches:
        state = format_bytes(cache.used) if cache.exists else "not there yet"
        writable = "" if cache.writable else ", CANNOT BE WRITTEN"
        rows.append(("cache", f"{cache.path}: {cache.kept}, {state}, {size(cache.free)} free{writable}"))
    return rows
