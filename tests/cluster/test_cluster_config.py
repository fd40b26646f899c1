"""What a cluster is made of, as a file says it, and what becomes of it without the extra."""

import builtins

import pytest

from multilora.cluster import build_app
from multilora.cluster.cluster_config import ClusterConfig
from multilora.errors import ConfigError


def made(**content):
    return ClusterConfig.make({"state_dir": "/s"} | content)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("state_dir: /s\nreplicas: {min: 2, max: 5}\nserve:\n  tp_size: 2\n  device: cuda\n")
    config = ClusterConfig.read(path)
    assert (config.min_replicas, config.max_replicas, config.gpus, config.autoscales) == (2, 5, 2, True)
    assert made(serve={"device": "cpu"}).gpus == 0 and not made(replicas=3).autoscales


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"replica": 3}, "replica: unknown; did you mean replicas"),
        ({"replicas": 0}, "replicas: 0 to 0"),
        ({"replicas": {"min": 3, "max": 2}}, "replicas: 3 to 2"),
        ({"replicas": {"least": 1}}, "expected a number, or min and max"),
        ({"port": "x"}, "port: 'x' is not of type int"),
        ({"factor": 1.0}, "factor: 1.0: must be above 1"),
        ({"slack": 0}, "slack: must be above 0"),
        ({"retries": -1}, "retries"),
        ({"copies": 0}, "copies"),
        ({"serve": {"port": 1}}, "serve.port: this is the cluster's affair"),
        ({"serve": {"lora_resolver_dir": "/x"}}, "no resolver"),
        ({"serve": {"modle_path": "x"}}, "modle_path"),
        ({"serve": []}, None),
        ({"serve": "x"}, "serve: expected a mapping"),
    ],
)
def test_what_is_wrong_is_said(content, message):
    if message is None:
        made(**content)
        return
    with pytest.raises(ConfigError, match=message):
        made(**content)


def test_a_state_directory_is_needed_and_files_are_mappings(tmp_path):
    with pytest.raises(ConfigError, match="state_dir"):
        ClusterConfig.make({})
    path = tmp_path / "x.yaml"
    for text, message in (("- 1", "expected a mapping"), ("{", "cannot be read")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ClusterConfig.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        ClusterConfig.read(tmp_path / "none")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_ray(name, *args, **kwargs):
        if name.partition(".")[0] == "ray" or name == "multilora.cluster.ray_app":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ConfigError, match=r"multilora\[ray\]"):
        build_app({"state_dir": "/s"})
