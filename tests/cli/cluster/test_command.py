"""`multilora cluster`: its command line and exit codes. What it starts is tested in tests/cluster.

Covers `cluster/args.py`, `cluster/command.py`.
"""

from multilora.__main__ import main
from multilora.cli import parser


def test_the_command_line():
    args = parser.parse(["cluster", "--config", "c.yaml", "--check"])
    assert args == parser.ClusterArgs("cluster", "c.yaml", True)


def test_a_file_is_checked(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"state_dir: {tmp_path}\nreplicas: 2\n")
    assert main(["cluster", "--config", str(path), "--check"]) == 0
    path.write_text("replicas: 2\n")
    assert main(["cluster", "--config", str(path)]) == 2


def test_the_file_must_be_named():
    assert main(["cluster"]) == 2
