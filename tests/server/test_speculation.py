"""What clients see of speculative decoding: the same answers and counts, in fewer pieces, and the metrics.

Covers `metrics/drafts.py` too.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from fakes.async_engine import InProcessEngine
from fakes.server_app import LocalServer
from prometheus_client.parser import text_string_to_metric_families

from multilora import demo
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.front.observer import Origin
from multilora.front.tokenizer import Tokenizer
from multilora.logs import RecentLines
from multilora.server.workers.events import WorkerEvents

ADAPTERS = demo.adapter_paths()
TEXT = "Q: Name the months of the year.\nA: January, February, March, April, May, June, July, August.\n" * 4
GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


class Door:
    """A server over an engine in this process."""

    def __init__(self, **options: Any):
        self._loop = asyncio.Runner()
        config = {"device": "cpu", "log_level": "warning", "lora_paths": [f"{n}={p}" for n, p in ADAPTERS.items()]}
        made = Config.make(**config, **options)
        self.engine = self.run(InProcessEngine.start(made))
        self.server = LocalServer(self.engine, Tokenizer.of(made), **options)
        for name, path in ADAPTERS.items():
            self.run(self.server.send("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}))

    def run(self, work: Any) -> Any:
        return self._loop.run(asyncio.wait_for(work, 120))

    def post(self, route: str, body: dict[str, Any]) -> Any:
        answer = self.run(self.server.send("POST", route, body))
        assert answer.status == 200, answer.text
        return answer

    def metric(self, name: str, **labels: str) -> float:
        text = self.run(self.server.send("GET", "/metrics")).text
        found = [x for f in text_string_to_metric_families(text) for x in f.samples if x.name == name]
        return sum(x.value for x in found if labels.items() <= x.labels.items())

    def close(self) -> None:
        self.run(self.engine.shutdown())
        self._loop.close()


@pytest.fixture(scope="module")
def doors() -> Iterator[tuple[Door, Door]]:
    """Without drafts, and with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
        made = Door(), Door(speculative_algorithm="ngram")
    yield made
    for door in made:
        door.close()


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/generate", {"text": TEXT, "sampling_params": GREEDY}),
    "an adapter and logprobs": (
        "/generate",
        {
            "text": TEXT,
            "lora_path": "pirate",
            "sampling_params": GREEDY,
            "return_logprob": True,
            "top_logprobs_num": 2,
        },
    ),
    "sampled": ("/generate", {"text": TEXT, "sampling_params": GREEDY | {"temperature": 0.6, "sampling_seed": 3}}),
    "penalties": ("/generate", {"text": TEXT, "sampling_params": GREEDY | {"repetition_penalty": 1.2}}),
    "stop string": (
        "/v1/completions",
        {"model": "sql", "prompt": TEXT, "stop": ["May"], "max_tokens": 60, "temperature": 0},
    ),
    "several": ("/v1/completions", {"model": "base:json", "prompt": [TEXT, TEXT[:90]], "n": 2, "seed": 1}),
}


def compared(value: Any, *, approximately: bool = False) -> Any:
    """What does not differ between two answers to the same question."""
    if isinstance(value, dict):
        changing = ("id", "created", "e2e_latency", "queue_time")
        return {key: compared(one, approximately=approximately) for key, one in value.items() if key not in changing}
    if isinstance(value, list):
        return [compared(one, approximately=approximately) for one in value]
    return pytest.approx(value, abs=1e-4) if approximately and isinstance(value, float) else value


@pytest.mark.parametrize("what", BODIES)
def test_answers_and_usage_are_the_same(doors: tuple[Door, Door], what: str):
    route, body = BODIES[what]
    plain, drafted = (door.post(route, body).json() for door in doors)
    assert compared(drafted) == compared(plain, approximately=True)


def test_a_stream_brings_the_same_text_in_fewer_pieces(doors: tuple[Door, Door]):
    body = {"text": TEXT, "sampling_params": GREEDY, "stream": True}
    plain, drafted = (door.post("/generate", body).frames for door in doors)
    assert drafted[-1]["output_ids"] == plain[-1]["output_ids"]
    assert drafted[-1]["text"] == plain[-1]["text"]
    assert len(drafted) < len(plain)


def test_drafts_are_counted_for_all_and_by_adapter(doors: tuple[Door, Door]):
    plain, drafted = doors
    for door in doors:
        door.post("/generate", {"text": TEXT, "lora_path": "pirate", "sampling_params": GREEDY})
        door.post("/generate", {"text": TEXT, "sampling_params": GREEDY})
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    drafts, tokens, accepted = (drafted.metric(f"vllm:spec_decode_{name}_total") for name in names)
    assert 0 < drafts < tokens
    assert 0 < accepted <= tokens
    for name in names:
        total = drafted.metric(f"vllm:spec_decode_{name}_total")
        assert total == drafted.metric(f"multilora:spec_decode_{name}_total")
        assert drafted.metric(f"multilora:spec_decode_{name}_total", adapter_name="pirate") > 0
        assert plain.metric(f"vllm:spec_decode_{name}_total") == 0


def test_what_a_worker_counts_reaches_the_supervisor(doors: tuple[Door, Door]):
    events = WorkerEvents(RecentLines())
    events.verified(Origin("pirate", ""), 8, 5)
    events.verified(Origin("pirate", ""), 4, 0)
    assert events.take().verified == [(Origin("pirate", ""), [(8, 5), (4, 0)])]
    assert events.take().verified == []
