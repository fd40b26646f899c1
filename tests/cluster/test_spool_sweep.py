"""What replicas that are gone have left."""

import os

from multilora.cluster.spool_sweep import OLD_SECONDS, sweep


def folder(root, owner, version, age):
    path = root / owner / version
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"x")
    for each in (path, path.parent):
        os.utime(each, (1000 - age, 1000 - age))
    return path


def test_only_what_nobody_needs_goes(tmp_path):
    old = OLD_SECONDS + 1
    used, left = folder(tmp_path, "gone", "1", old), folder(tmp_path, "gone", "2", old)
    os.utime(used.parent, (1000 - old, 1000 - old))
    alive, alone = folder(tmp_path, "alive", "1", old), folder(tmp_path, "empty", "5", old)
    young = folder(tmp_path, "young", "9", 1)
    gone = sweep(tmp_path, [str(used)], ["alive"], now=1000)
    assert sorted(gone) == sorted([left, alone, alone.parent])
    assert used.exists() and alive.exists() and young.exists()
    assert not left.exists() and not alone.parent.exists()
    assert sweep(tmp_path / "none", [], []) == []
