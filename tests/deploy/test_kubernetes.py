"""What `deploy/` has for Kubernetes: YAML that parses, flags and keys that exist, probes that lead to routes, a grace
period that is longer than the drain. The chart is rendered by helm where that is at hand, else what it needs of a
template is put in here.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from multilora.cli import parser
from multilora.cluster.cluster_config import ClusterConfig
from multilora.server.access_rules import RULES, Need

ROOT = Path(__file__).parents[2] / "deploy"
CHART = ROOT / "helm" / "multilora"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def rendered(mode):
    """The chart's documents, with its default values but for the mode."""
    if shutil.which("helm"):
        command = ["helm", "template", "release", str(CHART), "--set", f"mode={mode}"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return [one for one in yaml.safe_load_all(text) if one]
    name = {"deployment": "deployment.yaml", "ray": "rayservice.yaml"}[mode]
    return [one for one in yaml.safe_load_all(_by_hand((CHART / "templates" / name).read_text())) if one]


def _by_hand(text):
    """As the template engine does it for the few words that the chart's templates have."""
    flags = [
        f"            - --{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        + ("" if isinstance(value, bool) else f"={value}")
        for name, value in VALUES["serve"].items()
    ]
    text = re.sub(r" *\{\{- range.*?\{\{- end \}\}\n *\{\{- end \}\}", "\n".join(flags), text, flags=re.DOTALL)
    text = re.sub(r" *\{\{- if \.Values\.authSecret \}\}.*?\{\{- end \}\}\n", "", text, flags=re.DOTALL)
    text = re.sub(r" *\{\{- (if|end)[^\n]*\}\}\n?", "", text)
    return re.sub(r"\{\{ (.*?) \}\}", lambda match: _expression(match[1]), text)


def _expression(words):
    if words == ".Release.Name":
        return "release"
    if words.endswith("| toJson"):
        extra = {"tp_size": VALUES["gpus"], "drain_seconds": VALUES["drainSeconds"]}
        return json.dumps(extra | VALUES["serve"])
    if added := re.fullmatch(r"add \.Values\.(\w+) (\d+)", words):
        return str(VALUES[added[1]] + int(added[2]))
    path = re.fullmatch(r"\.Values\.([\w.]+)( \| quote)?", words)
    assert path, words
    value = VALUES
    for key in path[1].split("."):
        value = value[key]
    return json.dumps(str(value)) if path[2] else str(value)


def documents(name):
    return list(yaml.safe_load_all((ROOT / "kubernetes" / name).read_text()))


def of_kind(kind, found):
    return next(one for one in found if one["kind"] == kind)


DEPLOYMENTS = {"manifest": lambda: documents("inference-gateway.yaml"), "chart": lambda: rendered("deployment")}
SERVICES = {"manifest": lambda: documents("rayservice.yaml"), "chart": lambda: rendered("ray")}


@pytest.mark.parametrize("found", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_plain_pods_are_started_with_flags_that_exist_and_drain_in_time(found):
    spec = of_kind("Deployment", found())["spec"]["template"]["spec"]
    server = spec["containers"][0]
    config = parser.parse(server["args"]).config()
    assert config.host == "0.0.0.0" and config.port == server["ports"][0]["containerPort"]
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > config.drain_seconds + pause + 5
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert RULES[server[probe]["httpGet"]["path"]].need is Need.NOTHING
    volumes = {volume["name"] for volume in spec["volumes"]}
    containers = (*spec["containers"], *spec.get("initContainers", ()))
    assert {mount["name"] for one in containers for mount in one["volumeMounts"]} <= volumes


@pytest.mark.parametrize("found", SERVICES.values(), ids=SERVICES)
def test_a_ray_service_is_a_cluster_that_can_be_made(found):
    spec = of_kind("RayService", found())["spec"]
    application = yaml.safe_load(spec["serveConfigV2"])["applications"][0]
    module, _, function = application["import_path"].partition(":")
    assert (module, function) == ("multilora.cluster", "build_app")
    config = ClusterConfig.make(application["args"])
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    pod = workers["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config.engine.tp_size
    assert (workers["minReplicas"], workers["maxReplicas"]) == (config.min_replicas, config.max_replicas)
    assert pod["terminationGracePeriodSeconds"] > config.engine.drain_seconds + 5
    for group in (spec["rayClusterConfig"]["headGroupSpec"], workers):
        inside = group["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in inside["containers"][0]["volumeMounts"]}
        assert mounts["state"] == config.state_dir and mounts.keys() <= {one["name"] for one in inside["volumes"]}


def test_the_inference_pool_is_of_these_pods():
    found = documents("inference-gateway.yaml")
    pods, pool = of_kind("Deployment", found), of_kind("InferencePool", found)
    assert pool["spec"]["selector"] == pods["spec"]["selector"]
    port = pods["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert pool["spec"]["targetPorts"] == [{"number": port}]
    wanted = yaml.safe_load(of_kind("ConfigMap", found)["data"]["configmap.yaml"])["vLLMLoRAConfig"]
    assert wanted["port"] == port
    assert of_kind("HTTPRoute", found)["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


@pytest.mark.skipif(not shutil.which("helm"), reason="no helm here")
def test_the_chart_is_clean():
    subprocess.run(["helm", "lint", "--strict", str(CHART)], check=True, timeout=60)
