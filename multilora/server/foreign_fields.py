"""Fields that clients of OpenAI, SGLang or vLLM send and that a route here does not implement.

A client that fills in every field of a peer's body must be served as long as it asks for nothing that is missing
here. A field without effect on the answer is therefore ignored, whatever its value, a field at a neutral value too,
and everything else is refused by name. Each field's name is logged once.

Owns the tables of such fields; `tests/data/peer_fields.json` holds what the peers' sources say, and a test sends
each of those fields at its default. Knows nothing of the fields that are implemented, except the names it is given.
"""

import difflib
import logging
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from multilora.errors import BadRequest

logger = logging.getLogger(__name__)

MAX_NAMES_LOGGED = 1000
"""Clients choose the names: neither the log nor the memory of what was logged may grow with them."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS: Mapping[str, frozenset[str]] = {
    # who asks, and what for; logs, metrics and traces; placement and order; hints about caches, media and pace
    "": _words(
        """user metadata store service_tier safety_identifier betas
        prompt_cache_key prompt_cache_retention prompt_cache_options prediction kv_hints skip_reading_prefix_cache
        rid request_id session_id conversation_id routing_key http_worker_ipc received_time external_trace_header
        log_metrics no_logs custom_labels return_cached_tokens_details
        routed_dp_rank data_parallel_rank disagg_prefill_dp_rank
        images_config video_config media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs
        use_audio_in_video min_dynamic_patch max_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch
        stream_interval stream_reasoning include_obfuscation max_tool_calls"""
    ),
    "/generate": _words("background modalities"),
    "sampling_params": _words("detokenize output_kind flat_logprobs skip_clone output_text_buffer_length"),
    "response_format.json_schema": _words("name description strict"),
    "text.format": _words("name description strict"),
    "reasoning": _words("summary generate_summary"),
    "/v1/messages": _words("cache_control context_management diagnostics inference_geo speed"),
    "thinking": _words("budget_tokens display"),
    "/load_lora_adapter": _words("lora_id"),
    "/load_lora_adapter_from_tensors": _words("lora_id"),
    "/unload_lora_adapter": _words("lora_id"),
    "/v1/load_lora_adapter": _words("base_model_name is_3d_lora_weight"),
    "/v1/unload_lora_adapter": _words("lora_int_id"),
    "/abort_request": _words("finished_reason weight_versions"),
    "/continue_generation": _words("torch_empty_cache"),
    "/start_profile": _words("req_type"),
}
"""By route ("": every route): the answer is the same whatever the value."""

NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "": {
        "model": ("default",),
        "n": (1,),
        "priority": (0,),
        "best_of": (1,),
        "beam_width": (1,),
        "length_penalty": (1,),
        "repetition_penalty": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "min_p": (0,),
        "top_p": (1,),
        "top_k": (-1, 0, 1 << 30),
        "min_tokens": (0,),
        "min_new_tokens": (0,),
        "top_logprobs": (0,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "routed_experts_start_len": (0,),
        "routed_experts_prompt_start": (0,),
        "tool_choice": ("auto", "none"),
        "function_call": ("auto", "none"),
        "parallel_tool_calls": (True,),
        "separate_reasoning": (True,),
        "include_reasoning": (True,),
        "verbosity": ("medium",),
        "truncation": ("disabled",),
    },
    "/v1/completions": {"max_tokens": (16,), "temperature": (1,), "add_special_tokens": (True,)},
    "/v1/chat/completions": {
        "add_generation_prompt": (True,),
        "modalities": (["text"],),
        "return_flat_raw_top_logprobs_b64": (True, False),
    },
    "/inference/v1/generate": {"output_mode": ("tokens",)},
    "sampling_params": {
        "max_tokens": (16,),
        "max_new_tokens": (128,),
        "temperature": (1,),
        "stop_str_max_len": (0,),
        "stop_regex_max_len": (0,),
    },
    "/tokenize": {"add_generation_prompt": (True,)},
    "/v1/embeddings": {"encoding_format": ("float",), "embed_dtype": ("float32",), "endianness": ("native",)},
    "/v1/score": {"temperature": (1,), "max_tokens_per_query": (0,), "max_tokens_per_doc": (0,)},
    "/v1/rerank": {
        "return_documents": (True,),
        "top_n": (0,),
        "max_tokens_per_query": (0,),
        "max_tokens_per_doc": (0,),
    },
}
"""By route ("": every route) and name: the values that ask for nothing, beside null.

Of a field that is not listed the values null, false and "nothing" (an empty text, list or object, a list of nulls)
are neutral. Of a listed one they are not: `false` for a field that is true by default changes the answer.
"""

REASONS: Mapping[str, str] = {
    "suffix": "no model here is prompted to fill in the middle; put its own infill format into the prompt",
    "best_of": "no answer is generated that is not returned; n is how many are",
    "use_beam_search": "answers are sampled or greedy, there is no beam search",
    "beam_width": "answers are sampled or greedy, there is no beam search",
    "length_penalty": "it belongs to beam search, which is not served",
}
"""Why a field is refused, where more can be said than that it is not served."""

ALIASES = {"/v1/tokenize": "/tokenize", "/v1/detokenize": "/detokenize", "/v1/messages/count_tokens": "/v1/messages"}


class LogOnce:
    """Logs each name at most once, and at most `limit` names in all."""

    def __init__(self, limit: int = MAX_NAMES_LOGGED):
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, name: str, route: str) -> None:
        if name not in self._seen and len(self._seen) < self._limit:
            self._seen.add(name)
            logger.info("field %s of %s has no effect here and is ignored", name, route)


_log_once = LogOnce()


def sort_out(body: Mapping[str, Any], implemented: Collection[str], route: str, *, log: LogOnce = _log_once) -> None:
    """Check the fields of a JSON object that the caller does not implement; the caller ignores them afterwards.

    `route` is the route's path, or the name of an object within bodies: "sampling_params", "stream_options",
    "response_format", "response_format.json_schema", "structured_outputs".
    Raises BadRequest naming the first field that asks for something that is missing here.
    """
    route = ALIASES.get(route, route)
    for name, value in body.items():
        if name in implemented:
            continue
        if not ignorable(name, value, route):
            raise BadRequest(_refusal(name, value, implemented, route), param=_short(name))
        log(_short(name), route)


def ignorable(name: str, value: Any, route: str) -> bool:
    """Whether the answer of `route` stays the same without this field, which is not implemented."""
    if value is None or name in HARMLESS[""] or name in HARMLESS.get(route, ()):
        return True
    listed = _neutral(name, route)
    return any(_same(value, neutral) for neutral in listed) if listed else _says_nothing(value)


def _neutral(name: str, route: str) -> tuple[Any, ...]:
    return NEUTRAL.get(route, {}).get(name, ()) or NEUTRAL[""].get(name, ())


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1, though 1.0 is."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None for item in value)  # of a batch, one for each item
    return value is False or (isinstance(value, str | dict) and not value)


def _refusal(name: str, value: Any, implemented: Collection[str], route: str) -> str:
    listed = _neutral(name, route)
    if listed:
        only = " or ".join(repr(neutral) for neutral in listed)
        reason = f": {REASONS[name]}" if name in REASONS else ""
        return f"{name}: {_short(reprlib.repr(value))} is not supported by this server, only {only} is{reason}"
    if name in REASONS:
        return f"{name}: not supported by this server: {REASONS[name]}"
    near = difflib.get_close_matches(_short(name), implemented, n=1, cutoff=0.85)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{_short(name)}: not supported by this server{hint}"


def _short(text: str, limit: int = 100) -> str:
    """For messages: bounded, and free of characters that cannot be written to a log."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in plain)
    return plain if len(plain) <= limit else f"{plain[:limit]}…"
