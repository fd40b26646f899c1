"""The routes over a real engine, as the openai package sends requests and reads answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from doors import ROWS, TOKENIZER, HttpDoor
from fakes.models import make_adapter, make_tiny_model
from openai import AsyncOpenAI, BadRequestError, NotFoundError

CLOSE = 1e-4
TEXTS = ["the cat sat on the mat", "x", "Rome is in Italy. " * 4]


class World:
    """A server with adapters a and b; PEFT's models say what embeddings are."""

    def __init__(self, path: Path):
        model = path / "model"
        self.models: dict[str, Any] = {
            "base": make_tiny_model(model, vocab_size=ROWS, bos_token_id=0, eos_token_id=1)
        }
        TOKENIZER.hf.save_pretrained(model)
        for seed, name in enumerate("ab"):
            adapter = make_adapter(
                path / name, model, seed=seed, r=8, target_modules="all-linear", use_dora=name == "b"
            )
            self.models[name] = adapter.base_model.model
        paths = {name: str(path / name) for name in "ab"}
        self.door = HttpDoor(model, lora_paths=paths, device="cpu", max_total_tokens=2048, chunked_prefill_size=16)

    @torch.no_grad()
    def embedding(self, name: str, text: str) -> torch.Tensor:
        ids = torch.tensor([TOKENIZER.encode(text)])
        row = self.models[name].get_decoder()(ids).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(row, dim=0)

    def client(self, use: Any) -> Any:
        """The result of the coroutine that `use` makes of a client."""

        async def run() -> Any:
            transport = httpx.ASGITransport(self.door.server.app)
            async with httpx.AsyncClient(transport=transport) as http:
                return await use(AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http))

        return self.door.run(run())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("world"))
    yield found
    found.door.close()


def test_embeddings_side_by_side(world: World) -> None:
    """Base and adapters at once, each request of several chunks; base64 is what the client asks for by itself."""

    async def use(client: AsyncOpenAI) -> Any:
        names = ["base", "a", "b", "base:a"]
        return await asyncio.gather(*(client.embeddings.create(model=name, input=TEXTS) for name in names))

    for name, found in zip(["base", "a", "b", "a"], world.client(use), strict=True):
        for text, item in zip(TEXTS, found.data, strict=True):
            assert torch.tensor(item.embedding).sub(world.embedding(name, text)).abs().max() < CLOSE
        assert found.usage.prompt_tokens == sum(len(TOKENIZER.encode(text)) for text in TEXTS)


def test_numbers_and_token_ids(world: World) -> None:
    async def use(client: AsyncOpenAI) -> Any:
        ids = [TOKENIZER.encode(text) for text in TEXTS]
        return await client.embeddings.create(model="a", input=ids, encoding_format="float", dimensions=8)

    for text, item in zip(TEXTS, world.client(use).data, strict=True):
        expected = torch.nn.functional.normalize(world.embedding("a", text)[:8], dim=0)
        assert torch.tensor(item.embedding).sub(expected).abs().max() < CLOSE


def test_errors_are_the_clients_own(world: World) -> None:
    async def use(client: AsyncOpenAI) -> list[Any]:
        calls = [("nope", "x", 4), ("a", "x", 99), ("a", "", 4), ("a", "word " * 500, 4)]
        create = client.embeddings.create
        made = [create(model=m, input=text, dimensions=size) for m, text, size in calls]
        return await asyncio.gather(*made, return_exceptions=True)

    unknown, size, empty, long = world.client(use)
    assert isinstance(unknown, NotFoundError)
    assert isinstance(size, BadRequestError)
    assert size.param == "dimensions"
    assert not isinstance(empty, Exception)  # it is read as the tokenizer's BOS
    assert isinstance(long, BadRequestError)
    assert long.code == "context_length_exceeded"
