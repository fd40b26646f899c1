"""The span of one sample of a request: vLLM's attributes of `llm_request`, those of OpenTelemetry's conventions for
generative AI, and which adapter it ran on.
"""

from multilora.front.adapter_spec import show
from multilora.front.generation import Sample
from multilora.front.observer import Ending
from multilora.tracing import TraceSpan


def end_span(span: TraceSpan, sample: Sample, ending: Ending, model: str) -> None:
    """The sample has ended."""
    sampling, says = sample.job.sampling, span.attributes
    says["gen_ai.operation.name"] = "text_completion"
    says["gen_ai.request.model"] = show(sample.job.adapters) or model
    says["gen_ai.response.model"] = model
    says["gen_ai.request.id"] = sample.rid
    says["gen_ai.request.n"] = ending.n
    says["gen_ai.request.temperature"] = sampling.temperature
    says["gen_ai.request.top_p"] = sampling.top_p
    if ending.max_tokens is not None:
        says["gen_ai.request.max_tokens"] = ending.max_tokens
    says["gen_ai.usage.prompt_tokens"] = says["gen_ai.usage.input_tokens"] = ending.prompt_tokens
    says["gen_ai.usage.completion_tokens"] = says["gen_ai.usage.output_tokens"] = ending.generated
    says["multilora.finish_reason"] = ending.reason
    if sample.origin.tenant:
        says["multilora.tenant"] = sample.origin.tenant
    if sample.job.adapters:
        says["multilora.adapter.name"] = show(sample.job.adapters)
        says["multilora.adapter.version"] = ",".join(str(version) for version, _ in sample.held.composition)
    if ending.first_seconds:
        says["gen_ai.latency.time_to_first_token"] = ending.first_seconds
        says["gen_ai.latency.time_in_queue"] = ending.queue_seconds
        says["gen_ai.latency.e2e"] = ending.seconds
    message = sample.stream.finished.message if sample.stream.finished else ""
    span.end(f"{ending.error}: {message}"[:1000] if ending.error else "")
