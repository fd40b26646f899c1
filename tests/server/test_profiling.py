"""/start_profile and /stop_profile: the peers' bodies, and that no client chooses a path outside."""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer


@pytest.fixture
def s(tmp_path):
    client = FakeEngineClient()
    client.profile_root = tmp_path / "profiles"
    return LocalServer(client, None)


def wanted(s, body):
    assert s.post("/start_profile", body).status == 200
    assert s.post("/stop_profile").status == 200
    return s.client.profiles[-1]


def test_without_a_body(s):
    for method in (s.get, s.post):
        assert method("/start_profile").text == "Start profiling.\n"
        path = s.client.profiles[-1].path
        assert path in method("/stop_profile").text
        assert path.startswith(str(s.client.profile_root))
        assert path.endswith("-TP-0.trace.json.gz")
    assert s.client.profiles[0].activities == ["CPU", "GPU"]
    assert s.client.profiles[0].with_stack


def test_the_body_of_sglang(s):
    body = {
        "output_dir": str(s.client.profile_root / "run"),
        "start_step": 10,
        "num_steps": "5",  # SGLang's benchmark sends text
        "activities": ["CPU"],
        "with_stack": False,
        "record_shapes": True,
        "profile_id": "id.1",
        "profile_prefix": "mine",
        "profile_by_stage": False,
        "profile_stages": None,
        "merge_profiles": False,
    }
    found = wanted(s, body)
    assert found.path == str(s.client.profile_root / "run" / "mine-id.1-TP-0.trace.json.gz")
    assert (found.start_step, found.num_steps, found.activities) == (10, 5, ["CPU"])
    assert (found.with_stack, found.record_shapes) == (False, True)


def test_the_body_of_vllm(s):
    found = wanted(s, {"profile_prefix": "v", "delay_iterations": 3, "max_iterations": 7})
    assert (found.start_step, found.num_steps) == (4, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_dir", "/etc"),
        ("output_dir", ".."),
        ("output_dir", "a/../../b"),
        ("output_dir", "link/inside"),
        ("output_dir", "a\0b"),
        ("profile_id", "../../etc/passwd"),
        ("profile_id", "a/b"),
        ("profile_prefix", "a/b"),
        ("activities", ["MEM"]),
        ("activities", ["RPD"]),
        ("num_steps", 0),
        ("num_steps", -1),
        ("num_steps", "many"),
        ("start_step", True),
        ("profile_by_stage", True),
        ("profile_stages", ["prefill"]),
        ("merge_profiles", True),
        ("detailed_annotations", True),
        ("profiler_kwargs", {"with_flops": True}),
        ("nonsense", 1),
    ],
)
def test_what_is_refused_is_named(s, field, value):
    s.client.profile_root.mkdir()
    (s.client.profile_root / "link").symlink_to("/")
    answer = s.post("/start_profile", {field: value})
    assert (answer.status, answer.error["param"]) == (400, field)
    assert s.client.profiles == []


def test_one_at_a_time(s):
    assert s.post("/stop_profile").status == 400
    assert s.post("/start_profile").status == 200
    assert "running already" in s.post("/start_profile").error["message"]
