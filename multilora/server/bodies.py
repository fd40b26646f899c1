"""The JSON bodies of the native and the adapter routes, and the base class of all bodies.

A body checks names and types of its fields, strictly: no unknown field, no number given as text. Meaning (ranges,
lengths, names of adapters) is checked by those who use it. Used by `native.py`, `adapters.py` and `openai_bodies.py`.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from multilora.errors import BadRequest


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# long lists: complain of the first wrong entry, not of each
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Prompts = Annotated[list[TokenIds], Field(fail_fast=True)]

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


class Body(BaseModel):
    """A strict JSON object. `ignored`: known fields without effect here. `unserved`: accepted only when empty."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    ignored: ClassVar[frozenset[str]] = frozenset()
    unserved: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_but_unused(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.unserved & data.keys():
            if not any(data[name] is empty or data[name] == empty for empty in _EMPTY):
                raise BadRequest(f"{name}: not supported by this server", param=name)
        return {name: value for name, value in data.items() if name not in cls.ignored | cls.unserved}


class GenerateBody(Body):
    """`POST /generate`. A list in `text` or `input_ids` is a batch; per-item fields may then be lists too."""

    ignored: ClassVar[frozenset[str]] = words(
        "log_metrics no_logs modalities background conversation_id priority custom_labels"
    )
    unserved: ClassVar[frozenset[str]] = words(
        """input_embeds image_data video_data audio_data token_ids_logprob return_hidden_states return_entropy
        return_bytes return_routed_experts custom_logit_processor session_params session_id lora_id extra_key
        bootstrap_host bootstrap_port bootstrap_room data_parallel_rank decode_tp_size http_worker_ipc
        require_reasoning return_prompt_token_ids mm_processor_kwargs use_audio_in_video"""
    )
    text: str | Texts | None = None
    input_ids: TokenIds | Prompts | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None


class AbortBody(Body):
    """`POST /abort_request`."""

    ignored: ClassVar[frozenset[str]] = frozenset({"finished_reason", "http_worker_ipc"})
    rid: str | None = None
    abort_all: bool = False
    abort_message: str | None = None


class LoadAdapterBody(Body):
    """`POST /load_lora_adapter`, as SGLang."""

    ignored: ClassVar[frozenset[str]] = frozenset({"rid", "http_worker_ipc", "lora_id"})
    unserved: ClassVar[frozenset[str]] = frozenset({"added_tokens_config"})
    lora_name: str
    lora_path: str | list[Any]  # a list: a named composition, see front/adapter_spec.py
    pinned: bool | None = None


class UnloadAdapterBody(Body):
    """`POST /unload_lora_adapter`, as SGLang."""

    ignored: ClassVar[frozenset[str]] = frozenset({"rid", "http_worker_ipc", "lora_id"})
    lora_name: str


class V1LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`, as vLLM."""

    ignored: ClassVar[frozenset[str]] = frozenset({"base_model_name", "is_3d_lora_weight"})
    lora_name: str
    lora_path: str | list[Any]  # a list: a named composition, see front/adapter_spec.py
    load_inplace: bool = False
    pinned: bool | None = None


class V1UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`, as vLLM. `lora_int_id` is vLLM's own number and has no meaning here."""

    ignored: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})
    lora_name: str
