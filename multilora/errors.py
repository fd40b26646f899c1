"""Every error a user can meet, each knowing its HTTP status.

    MultiloraError
    ├── ConfigError                 500  a start-up argument is wrong (the process exits with code 2)
    ├── ModelUnsupported            500  the base model cannot be served, refused by name
    ├── OutOfMemory                 500  the memory plan does not fit; says what asked for how much
    ├── BadRequest                  400  one field of a request is wrong
    │   ├── PromptTooLong           400
    │   ├── CannotFit               400  would not fit the memory even alone
    │   ├── PayloadTooLarge         413  the body is longer than the route reads
    │   ├── RequestTimeout          408  the body did not come in time
    │   ├── ResponseTooLarge        400  the answer has more bytes than one request is sent
    │   ├── LoraNotEnabled          400
    │   ├── PreviousResponseNotFound 400 `previous_response_id` is not stored (any more)
    │   └── UnknownAdapter          400  never loaded, or unloaded (404 under a bare OpenAI `model`)
    ├── UnknownModel                404  OpenAI `model` is neither the base model nor an adapter
    ├── UnknownResponse             404  a response id that is not stored (any more)
    ├── AdapterError                400  a load, unload or bring-back of an adapter failed
    │   ├── AdapterNotFound         400  no such directory, repository or file
    │   ├── AdapterForbidden        400  path outside --lora-root
    │   ├── AdapterInvalid          400  broken file, missing field, NaN, left-over tensor
    │   ├── AdapterUnsupported      400  a PEFT feature that is not served, refused by name
    │   ├── AdapterIncompatible     400  shapes of another model, or over a set limit
    │   ├── AdapterAlreadyLoaded    400
    │   ├── AdapterNotLoaded        400  unload of a name that does not exist
    │   ├── AdapterUnloading        400  the name is being unloaded
    │   ├── AdapterStarvation       400  pinning it would starve every other adapter
    │   ├── StorageFailed           507  the disk refuses what must be kept: it is full, or fails
    │   ├── AdapterQuotaExceeded    403  the tenant has as many adapters, or as large ones, as it may
    │   └── AdapterUnavailable      503  a hub or URL does not answer as it should; carries `retry_after` seconds
    ├── Unauthorized                401
    ├── Forbidden                   403  the key may not do this, or not with this adapter
    ├── MethodNotAllowed            405  GET, of a route that takes only POST while there are keys
    ├── RateLimited                 429  the key or adapter has used up what it may; carries `retry_after` seconds
    ├── QueueFull                   503  carries `retry_after` seconds
    ├── EnginePaused                503  paused and taking no requests; carries `retry_after` seconds
    │   └── EngineAsleep            503  its memory is released until /wake_up
    ├── ServerStopping              503  the server is being stopped; carries `retry_after` seconds
    ├── StepFailed                  500  a step that the request was in has failed; others go on
    ├── DeadlineExceeded            504  the request took longer than its timeout or --max-request-seconds
    └── EngineDead                  503  the engine process ended
        └── EngineRestarting        503  it ended and is being started again; carries `retry_after` seconds

`kind` (the class name) and the message travel between processes; `from_wire` makes the same type again.
"""


class MultiloraError(Exception):
    """The base of all errors. status: the HTTP status; param: the request field that it is about, if any."""

    status = 500

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def kind(self) -> str:
        """The class name, which travels between processes."""
        return type(self).__name__


class ConfigError(MultiloraError):
    """A start-up argument is unknown, malformed or contradicts another."""


class ModelUnsupported(MultiloraError):
    """The base model's architecture or one of its settings is not served."""


class OutOfMemory(MultiloraError):
    """The memory plan does not fit the device; the message lists what asked for how much."""


class BadRequest(MultiloraError):
    """One field of a request is wrong."""

    status = 400


class PromptTooLong(BadRequest):
    """The prompt is as long as the context, or longer."""


class CannotFit(BadRequest):
    """Prompt, `max_new_tokens` and adapter together exceed all memory that is not pinned."""


class PayloadTooLarge(BadRequest):
    """The body is longer than the route reads."""

    status = 413


class RequestTimeout(BadRequest):
    """The body did not come in time."""

    status = 408


class ResponseTooLarge(BadRequest):
    """The answer has more bytes than one request is sent."""

    @classmethod
    def over(cls, limit: int) -> "ResponseTooLarge":
        """The error of an answer that has over `limit` bytes."""
        advice = "ask for fewer tokens, samples or logprobs, or send several requests"
        return cls(f"the answer has over {limit} bytes (--max-response-bytes): {advice}")


class LoraNotEnabled(BadRequest):
    """An adapter was asked for while LoRA is off."""


class PreviousResponseNotFound(BadRequest):
    """`previous_response_id` names no stored response."""


class UnknownAdapter(BadRequest):
    """The adapter name was never loaded, or has been unloaded."""


class UnknownModel(MultiloraError):
    """The OpenAI field `model` names neither the base model nor an adapter."""

    status = 404


class UnknownResponse(MultiloraError):
    """No response is stored under the id: never, or not any more."""

    status = 404


class AdapterError(MultiloraError):
    """An adapter could not be loaded, unloaded or brought back."""

    status = 400


class AdapterNotFound(AdapterError):
    """No such directory, hub repository, or required file."""


class AdapterForbidden(AdapterError):
    """The path lies outside every --lora-root."""


class AdapterInvalid(AdapterError):
    """Not a valid adapter: the message names the file and the field or tensor."""


class AdapterUnsupported(AdapterError):
    """A PEFT feature that this release does not serve; the message names it."""


class AdapterIncompatible(AdapterError):
    """Shapes of another base model, or a rank or target over a limit set at start."""


class AdapterAlreadyLoaded(AdapterError):
    """The name is taken; unload it first."""


class AdapterNotLoaded(AdapterError):
    """The name does not exist."""


class AdapterUnloading(AdapterError):
    """The name is being unloaded."""


class AdapterStarvation(AdapterError):
    """Pinning this adapter would leave too little for any other request."""


class Unauthorized(MultiloraError):
    """The API key is missing or wrong."""

    status = 401


class Forbidden(MultiloraError):
    """The key may not do this, or not with this adapter."""

    status = 403


class MethodNotAllowed(MultiloraError):
    """The route takes only POST while there are keys."""

    status = 405


class RateLimited(MultiloraError):
    """The key or the adapter has used up what it may take; try again after `retry_after` seconds."""

    status = 429

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1):
        super().__init__(message, param=param)
        self.retry_after = retry_after


class AdapterQuotaExceeded(AdapterError):
    """The tenant has as many adapters, or as large ones, as it may; unload one first."""

    status = 403


class AdapterUnavailable(AdapterError):
    """A hub or URL does not answer as it should; try again after `retry_after` seconds."""

    status = 503
    retry_after = 5


class StorageFailed(AdapterError):
    """The disk refuses files or records that must be kept: it is full, or it fails."""

    status = 507


class QueueFull(MultiloraError):
    """The waiting queue is full; try again after `retry_after` seconds."""

    status = 503
    retry_after = 1


class EnginePaused(MultiloraError):
    """Generation is paused and takes no requests until it is resumed; try again after `retry_after` seconds."""

    status = 503
    retry_after = 1


class EngineAsleep(EnginePaused):
    """The engine has released its memory; no request is taken until it is woken up."""


class ServerStopping(MultiloraError):
    """The server is being stopped and waits no longer; another one may take over."""

    status = 503
    retry_after = 1


class StepFailed(MultiloraError):
    """A step has failed that the request was part of; the engine and all other requests go on."""


class DeadlineExceeded(MultiloraError):
    """The request took longer than its timeout, or than any request may."""

    status = 504


class EngineDead(MultiloraError):
    """The engine process ended."""

    status = 503


class EngineRestarting(EngineDead):
    """The engine process ended and is being started again; try again after `retry_after` seconds."""

    retry_after = 5


def _tree(cls: type[MultiloraError]) -> dict[str, type[MultiloraError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


def from_wire(kind: str, message: str) -> MultiloraError:
    """The error of class name `kind` (as sent by another process) with this message."""
    return _tree(MultiloraError).get(kind, MultiloraError)(message)
