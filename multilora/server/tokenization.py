"""`POST /tokenize` and `/detokenize`, also below `/v1`: text or messages to token ids and back, without the engine.

One answer serves both dialects: SGLang's and vLLM's fields are in it. Runs on the threads that tokenize prompts.
Called by `app.py`.
"""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.request_driver import RequestDriver
from multilora.errors import BadRequest
from multilora.front.effects import Lane
from multilora.front.request_front import RequestFront
from multilora.front.tools.request import offered_tools
from multilora.front.vocabulary import Vocabulary
from multilora.server.bodies import Body, Prompts, Texts, TokenIds
from multilora.server.chat_job import chat_prompt
from multilora.server.openai_bodies import Conversation
from multilora.server.resolving import resolved
from multilora.server.streaming import Json
from multilora.server.strict_route import StrictRoute

MAX_CHARACTERS = 1 << 20
UNBOUNDED = 4 << 20  # tokens of a conversation: its answer is no prompt


class TokenizeBody(Conversation):
    """Exactly one of `prompt` and `messages`. `add_special_tokens` is for `prompt`: templates write their own."""

    where = "/tokenize"
    model: str | None = None
    prompt: str | Texts | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`tokens`: the ids of one text, or a list of such lists."""

    where = "/detokenize"
    model: str | None = None
    tokens: TokenIds | Prompts
    skip_special_tokens: bool | None = None


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/tokenize")
    @routes.post("/v1/tokenize")
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """The token ids of a prompt, of several, or of a conversation."""
        async with resolved(request.receive, driver, body.model):
            vocabulary = _vocabulary(driver.front, body.model)
        answer: dict[str, Any] = await driver.run_blocking(Lane.LONG_TEXT, partial(_tokenize, body, vocabulary))
        return Json(answer | {"max_model_len": driver.front.engine.ready.context_length})

    @routes.post("/detokenize")
    @routes.post("/v1/detokenize")
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """The text of token ids."""
        async with resolved(request.receive, driver, body.model):
            vocabulary = _vocabulary(driver.front, body.model)
        return Json(await driver.run_blocking(Lane.LONG_TEXT, partial(_detokenize, body, vocabulary)))

    return routes


def _vocabulary(front: RequestFront, model: str | None) -> Vocabulary:
    """The vocabulary of the base model or the adapter that `model` names. Raises UnknownModel, UnknownAdapter."""
    return front.vocabularies.of(front.registry.resolve_model(model))


def _tokenize(body: TokenizeBody, vocabulary: Vocabulary) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("exactly one of prompt and messages must be given", param="prompt")
    if body.messages is not None:
        prompt = chat_prompt(body, body.messages, offered_tools(body.tools, body.tool_choice))
        return _answer(body, vocabulary, prompt.encode(vocabulary, UNBOUNDED))
    tokenizer = vocabulary.writer("prompt", "prompt")
    if sum(map(len, [body.prompt] if isinstance(body.prompt, str) else body.prompt or [])) > MAX_CHARACTERS:
        raise BadRequest(f"prompt: over {MAX_CHARACTERS} characters", param="prompt")
    special = body.add_special_tokens is not False
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    found = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    if isinstance(body.prompt, str):
        return _answer(body, vocabulary, found[0])
    answers = [_answer(body, vocabulary, ids) for ids in found]
    return {name: [answer[name] for answer in answers] for name in ("tokens", "count", "token_strs")}


def _answer(body: TokenizeBody, vocabulary: Vocabulary, ids: list[int]) -> dict[str, Any]:
    """The answer for one text."""
    texts = vocabulary.reader("token_strs").hf.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "token_strs": texts}


def _detokenize(body: DetokenizeBody, vocabulary: Vocabulary) -> dict[str, Any]:
    """`text` is SGLang's answer, without special tokens unless told otherwise; `prompt` is vLLM's, with them."""
    tokenizer = vocabulary.reader("tokens", "tokens")
    several = bool(body.tokens) and isinstance(body.tokens[0], list)
    lists: list[list[int]] = body.tokens if several else [body.tokens]  # type: ignore[assignment, list-item]
    for token in (token for ids in lists for token in ids):
        if not 0 <= token < vocabulary.size:
            raise BadRequest(
                f"tokens: token id {token} is outside the vocabulary of {vocabulary.size} tokens", param="tokens"
            )
    skip = body.skip_special_tokens
    texts = [tokenizer.decode(ids, skip_special_tokens=skip is not False) for ids in lists]
    prompts = [tokenizer.decode(ids, skip_special_tokens=bool(skip)) for ids in lists]
    return {"text": texts, "prompt": prompts} if several else {"text": texts[0], "prompt": prompts[0]}
