"""What the span of a request says."""

from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.tracing import CURRENT, TraceSpan


def traced(body, *adapters):
    """The records of one request, by name."""
    s = LocalServer(FakeEngineClient(), None)
    s.load(*adapters)
    records = []

    async def scenario():
        root = TraceSpan("root", "front", records.append, "a" * 32)
        CURRENT.set(root)
        return await s.send("POST", "/generate", body)

    answer = run(scenario())
    return answer, records, s


def test_a_request_on_an_adapter():
    body = {"input_ids": [5, 6], "lora_path": "a", "sampling_params": {"max_new_tokens": 3, "temperature": 0.5}}
    answer, (record,), s = traced(body, "a")
    assert answer.status == 200
    assert record.name == "llm_request"
    message = s.client.submitted[0]
    assert message.traceparent == f"00-{'a' * 32}-{record.span_id}-01"
    says = record.attributes
    assert says["multilora.adapter.name"] == says["gen_ai.request.model"] == "a"
    assert says["multilora.adapter.version"] == str(message.adapters[0][0])
    assert says["gen_ai.response.model"] == "base"
    assert (says["gen_ai.usage.prompt_tokens"], says["gen_ai.usage.completion_tokens"]) == (2, 3)
    assert (says["gen_ai.request.max_tokens"], says["gen_ai.request.temperature"]) == (3, 0.5)
    assert says["multilora.finish_reason"] == "length"
    assert says["gen_ai.latency.e2e"] >= says["gen_ai.latency.time_to_first_token"] > 0


def test_each_sample_has_a_span_and_no_text_of_its_prompt():
    body = {"input_ids": [5, 6], "sampling_params": {"n": 3}}
    _, records, _ = traced(body)
    assert len({record.span_id for record in records}) == len(records) == 3
    assert "multilora.adapter.name" not in records[0].attributes


def test_a_request_that_is_refused_ends_its_span():
    answer, (record,), s = traced({"input_ids": [999]})
    assert answer.status == 400
    assert record.attributes["multilora.finish_reason"] == "abort"
    assert not s.client.submitted
