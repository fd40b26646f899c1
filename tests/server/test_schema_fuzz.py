"""Bodies made from /openapi.json by schemathesis, right and wrong ones: no 5xx but a 503, no hang, no adapter held.

`make fuzz` sends so many of each operation that there are over 10,000; here are a few of each.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

CASES = int(os.environ.get("MULTILORA_FUZZ_CASES", "10"))
"""Cases of each operation, half of them against its schema."""
NEVER_ENDING = {"/start_profile"}  # it waits for a step of an engine that the fake does not take
MODES = list(schemathesis.GenerationMode)


def server() -> LocalServer:
    s = LocalServer(FakeEngineClient(vocab_size=320), byte_level_tokenizer(), lora_root=tempfile.gettempdir())
    s.load("a")
    return s


SERVER = server()
SCHEMA = schemathesis.openapi.from_dict(SERVER.get("/openapi.json").json())
OPERATIONS = {f"{o.method.upper()} {o.path}": o for o in (found.ok() for found in SCHEMA.get_all_operations())}
SEEN: Counter[int] = Counter()


@pytest.fixture(autouse=True)
def _count_the_cases(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The summary at the end says how many bodies were sent, and what came back."""
    before = SEEN.copy()
    yield
    sent = SEEN - before
    if sent:
        answers = {f"answers with {status}": n for status, n in sent.items()}
        record_property("counted", {"cases": sent.total()} | answers)


def path_of(case) -> str:
    query = {key: value for key, value in (case.query or {}).items() if value is not None}
    return case.formatted_path + (f"?{urlencode(query, doseq=True, errors='replace')}" if query else "")


def body_of(case):
    return None if type(case.body).__name__ == "NotSet" else case.body


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", sorted(name for name in OPERATIONS if name.split()[1] not in NEVER_ENDING))
def test_no_body_breaks_an_operation(name, mode):
    operation = OPERATIONS[name]
    if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("nothing of it can be wrong")

    @settings(
        max_examples=max(1, CASES // 2),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        answer = run(SERVER.send(case.method, path_of(case), body_of(case)))  # which waits for 20 s at most
        SEEN[answer.status] += 1
        assert answer.status < 500 or answer.status == 503, (answer.status, answer.text, case.as_curl_command())

    try:
        send()
    finally:
        resume()


def resume() -> None:
    """What one operation has changed is not for the next one to find."""
    run(SERVER.send("POST", "/resume", {}))
    run(SERVER.send("POST", "/wake_up", {}))


@pytest.mark.slow
def test_no_adapter_is_held_afterwards():
    held = [ref.name for ref in SERVER.registry.refs() if ref.num_requests]
    assert held == [] and SERVER.driver.front.in_flight == 0
    if SEEN.total() > 1000:
        assert SEEN[200] > SEEN.total() // 50, SEEN


def test_the_schema_has_operations():
    assert {"POST /generate", "POST /v1/chat/completions", "GET /v1/models"} <= OPERATIONS.keys()
