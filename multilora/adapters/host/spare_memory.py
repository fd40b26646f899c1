"""How much memory this process can still have, by the system and by its container. Called by `engine/build.py`."""

from pathlib import Path


def spare_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are left, caches of files included; None: the system does not say. root: the root directory."""
    left = [left for left in (_of_system(root), _of_container(root)) if left is not None]
    return min(left, default=None)


def _of_system(root: Path) -> int | None:
    kilobytes = _numbers(root / "proc/meminfo").get("MemAvailable:")
    return None if kilobytes is None else kilobytes << 10


def _of_container(root: Path) -> int | None:
    """Bytes left in the control group (version 2) of this process; None: it has no limit."""
    try:
        group = next(line[3:] for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::"))
        folder = root / "sys/fs/cgroup" / group.strip("/")
        limit, used = int(_text(folder / "memory.max")), int(_text(folder / "memory.current"))
    except (StopIteration, ValueError):  # there is no group, or its limit is "max"
        return None
    stat = _numbers(folder / "memory.stat")
    return max(0, limit - used + stat.get("inactive_file", 0) + stat.get("active_file", 0))


def _numbers(path: Path) -> dict[str, int]:
    """name → number, from the lines that begin with both."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    """The file's text; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
