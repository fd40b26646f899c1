"""The cluster on Ray Serve: on this machine, with the bundled model, under load, with deaths, scaling and swaps.

Covers `ray_app.py`, `running.py`, `ray_router.py`. Skipped where Ray is not installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "ray_cluster_process.py"


def environment():
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def python(code):
    """Run in a process of its own: Ray warns, logs and keeps threads."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


DEPLOYMENTS = """
import json, pickle
from multilora.cluster import ray_app
from multilora.cluster.cluster_config import ClusterConfig

def config(**content):
    return ClusterConfig.make({"state_dir": "/s"} | content)

def options(**content):
    made = ray_app._replica_options(config(**content))
    made.pop("request_router_config")
    scaling = made.pop("autoscaling_config", None)
    return made | ({"scales": [scaling.min_replicas, scaling.max_replicas]} if scaling else {})

def arguments(**content):
    made = ray_app.application(config(**content))._bound_deployment
    return made._version, pickle.dumps(made.init_args[0])

print(json.dumps({
    "cpu": options(replicas=3, serve={"device": "cpu"}),
    "cuda": options(replicas={"min": 1, "max": 4}, serve={"device": "cuda", "tp_size": 2, "drain_seconds": 7}),
    "same": arguments(replicas=3) == arguments(replicas=4, ingresses=2),
    "other": arguments(replicas=3) == arguments(replicas=3, serve={"max_running_requests": 7}),
}))
"""


@needs_ray
@pytest.mark.slow
def test_deployments_are_what_the_file_says():
    found = json.loads(python(DEPLOYMENTS).splitlines()[-1])
    cpu, cuda = found["cpu"], found["cuda"]
    assert cpu["num_replicas"] == 3 and cpu["ray_actor_options"]["num_gpus"] == 0
    assert cuda["scales"] == [1, 4] and cuda["graceful_shutdown_timeout_s"] == 7
    assert cuda["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 2.0}]
    assert found["same"] and not found["other"]  # another number of replicas restarts none of them


NEWS = """
import json
from types import SimpleNamespace
from ray.serve.request_router import RequestRouter
from multilora.cluster.ray_router import NEWS, AdapterRequestRouter, Heard, PromptRead
from multilora.cluster.route_request import AdapterNeed, RouteRequest

RequestRouter.update_replicas = lambda self, replicas: None
router = AdapterRequestRouter.__new__(AdapterRequestRouter)
router.initialize_state(factor=1.25, slack=8.0, copies=2)
stats = {"number": 1, "load": 0.0, "prompt": 0, "device": {"sql": 1}, "host": {}, "room": 100, "sizes": {"sql": 60}}
replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{i}"), routing_stats=stats) for i in range(2)]
router.update_replicas(replicas)
by_name = {replica.replica_id.unique_id: replica for replica in replicas}

def choose(number, prompt):
    request = RouteRequest(AdapterNeed("sql", 1), prompt=prompt, number=number)
    [chosen] = router._choose(request, f"id{number}", by_name)
    return chosen.replica_id.unique_id

found = {"long": choose(1, 5000)}
found["others"] = [choose(2, 1), choose(3, 1)]
NEWS.extend([PromptRead(1), PromptRead(99), Heard("gone", 1.0, 0)])
found["after"] = choose(4, 1)
for i in range(1, 5):
    router._end(f"id{i}")
found["load"] = sum(router._router.load_of(name) for name in by_name)
found["left"] = [len(router._sent), len(router._numbers), len(NEWS)]
print(json.dumps(found))
"""


PATIENCE = """
from multilora.cluster.running import PROXY_SECONDS, application_of
from multilora.cluster.cluster_config import ClusterConfig
application_of(ClusterConfig.make({"state_dir": "/s"}))
from ray.serve._private.constants import PROXY_READY_CHECK_TIMEOUT_S
print(PROXY_READY_CHECK_TIMEOUT_S)
"""


@needs_ray
@pytest.mark.slow
def test_ray_waits_longer_for_its_proxy_on_a_busy_machine():
    assert float(python(PATIENCE).splitlines()[-1]) == 60


@needs_ray
@pytest.mark.slow
def test_the_router_hears_what_answers_say():
    found = json.loads(python(NEWS).splitlines()[-1])
    assert found["long"] not in found["others"] and found["after"] == found["long"]
    assert found["load"] == 0 and found["left"] == [0, 0, 0]


@needs_ray
@pytest.mark.slow
def test_a_cluster_under_load_loses_nothing(tmp_path):
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2700, env=environment())
    line = next((line for line in done.stdout.splitlines() if line.startswith("REPORT ")), None)
    assert line is not None, done.stderr[-4000:]
    report = json.loads(line.removeprefix("REPORT "))
    assert report["wrong"] == []
    assert report["endings"]["whole"] > 10 and report["endings"]["stream"] > 10
    assert len(report["after"]) == 1 and report["old"] in report["before"]
    assert report["after"] != [report["old"]]
    assert report["adapters"] == 61
