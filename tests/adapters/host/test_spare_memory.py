"""What the system and a container's limit leave, read from files as Linux writes them."""

from pathlib import Path

import pytest

from multilora.adapters.host.spare_memory import spare_memory

MEMINFO = "MemTotal:       16384 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0\n"


def system(root: Path, group: str = "", **files: str) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": f"0::/{group}\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)
    return root


def test_without_a_limit_the_system_says(tmp_path: Path) -> None:
    assert spare_memory(system(tmp_path, max="max\n", current="5\n")) == 8000 << 10


@pytest.mark.parametrize("group", ["", "user.slice/one"])
def test_a_container_that_leaves_less(tmp_path: Path, group: str) -> None:
    stat = "anon 3000\nfile 2500\ninactive_file 2000\nactive_file 100\n"
    assert spare_memory(system(tmp_path, group, max="9000\n", current="6000\n", stat=stat)) == 5100


def test_a_container_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert spare_memory(system(tmp_path, max="9000\n", current="9900\n")) == 0


def test_a_container_that_leaves_more(tmp_path: Path) -> None:
    assert spare_memory(system(tmp_path, max=str(1 << 40), current="0\n")) == 8000 << 10


def test_another_system_does_not_say(tmp_path: Path) -> None:
    assert spare_memory(tmp_path) is None
