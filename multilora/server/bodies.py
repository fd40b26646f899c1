"""The JSON bodies of the native and the adapter routes, and the base class of all bodies.

A body checks the types of its fields strictly: no number given as text. A field that is null has its default, and
`foreign_fields.py` decides about the fields that a body does not have. Meaning (ranges, lengths, names of adapters)
is checked by those who use a body: `native.py`, `adapters.py`, `tensors.py`, `operations.py` and `openai_bodies.py`.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from multilora.errors import BadRequest
from multilora.server.foreign_fields import sort_out


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 16.0 is the integer 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integrals(value: Any) -> Any:
    """Long lists are gone through in C."""
    return [_integral(item) for item in value] if type(value) is list and float in set(map(type, value)) else value


Integer = Annotated[int, BeforeValidator(_integral)]
# long lists: complain of the first wrong entry, not of each
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True), BeforeValidator(_integrals)]
Prompts = Annotated[list[TokenIds], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON object. `where`: its route, or its name within other bodies, as `foreign_fields.py` has it."""

    model_config = ConfigDict(strict=True, protected_namespaces=())
    where: ClassVar[str]
    prompt_fields: ClassVar[tuple[str, ...]] = ()
    """Those that may be token ids, many of them."""

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, data: Any) -> Any:
        """The fields that this body has and that are not null. Raises BadRequest for a foreign field in effect."""
        if not isinstance(data, dict):
            return data
        own = [field.alias or name for name, field in cls.model_fields.items()]
        try:
            sort_out(data, own, cls.where)
        except BadRequest as e:
            if cls.where.startswith("/"):
                raise
            raise BadRequest(f"{cls.where}.{e.message}", param=cls.where.partition(".")[0]) from None
        return {name: data[name] for name in own if data.get(name) is not None}


class GenerateBody(Body):
    """`POST /generate`. A list in `text` or `input_ids` is a batch; per-item fields may then be lists too."""

    where = "/generate"
    prompt_fields = ("input_ids",)
    text: str | Texts | None = None
    input_ids: TokenIds | Prompts | None = None
    model: str | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    return_logprob: bool | list[bool | None] | None = None
    logprob_start_len: Integer | list[Integer | None] | None = None
    top_logprobs_num: Integer | list[Integer | None] | None = None
    return_text_in_logprobs: bool | None = None
    logprobs_mode: Any = None  # see params.parse_logprobs_mode
    cache_salt: Any = None  # see front.prompt.prefix_salt, as for extra_key
    extra_key: Any = None
    priority: Integer | None = None
    timeout: float | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None


class AbortBody(Body):
    """`POST /abort_request`."""

    where = "/abort_request"
    rid: str | None = None
    abort_all: bool = False
    abort_message: str | None = None


class PauseBody(Body):
    """`POST /pause_generation`, as SGLang."""

    where = "/pause_generation"
    mode: str = "abort"


class ContinueBody(Body):
    """`POST /continue_generation`, as SGLang."""

    where = "/continue_generation"


class MemoryBody(Body):
    """`/release_memory_occupation` and `/resume_memory_occupation`, as SGLang. tags None: everything."""

    where = "/release_memory_occupation"
    tags: list[str] | None = None


class AbortRequestsBody(Body):
    """`POST /abort_requests`, as vLLM. Nothing in it: every request."""

    where = "/abort_requests"
    request_ids: list[str] | None = None


class ResetCacheBody(Body):
    """`POST /reset_prefix_cache` by clients that send JSON; vLLM's have a query."""

    where = "/reset_prefix_cache"
    reset_running_requests: bool | None = None


class LoadBody(Body):
    """What all routes that load an adapter share. upsert: the name may be loaded already; weight_version: how answers
    name the weights; allow_update_mid_request: requests that run go on with the new weights, null: as the server's
    --lora-load-mode has it."""

    lora_name: str
    pinned: bool | None = None
    upsert: bool = False
    weight_version: str | None = None
    allow_update_mid_request: bool | None = None


class LoadAdapterBody(LoadBody):
    """`POST /load_lora_adapter`, as SGLang."""

    where = "/load_lora_adapter"
    lora_path: str | list[Any]  # a list: a named composition, see front/adapter_spec.py


class UnloadAdapterBody(Body):
    """`POST /unload_lora_adapter`, as SGLang."""

    where = "/unload_lora_adapter"
    lora_name: str


class V1LoadAdapterBody(LoadAdapterBody):
    """`POST /v1/load_lora_adapter`, as vLLM."""

    where = "/v1/load_lora_adapter"
    load_inplace: bool = False


class SkyrlLoadAdapterBody(LoadAdapterBody):
    """`POST /skyrl/v1/load_lora_adapter`, as SkyRL's own inference servers."""

    where = "/skyrl/v1/load_lora_adapter"


class V1UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`, as vLLM."""

    where = "/v1/unload_lora_adapter"
    lora_name: str
