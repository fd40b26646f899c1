"""prime-rl's way to roll out: `renderers` posts token ids to /inference/v1/generate and checks the answer."""

import asyncio
import os

from checks import ADAPTER, QUESTION, V1, answer, check, main, same
from openai import AsyncOpenAI
from renderers.client import generate
from renderers.default import DefaultRenderer
from transformers import AutoTokenizer

TOKENIZER = AutoTokenizer.from_pretrained(os.environ["MULTILORA_TOKENIZER"])
MESSAGES = [{"role": "user", "content": QUESTION}]


async def roll_out(**params):
    client = AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)
    return await generate(
        client=client, renderer=DefaultRenderer(TOKENIZER), messages=MESSAGES, model=ADAPTER, sampling_params=params,
        cache_salt="0", priority=0,
    )  # fmt: skip


@check("generate: greedy, no max_tokens")
def greedy():
    found = asyncio.run(roll_out(temperature=0.0))
    same(len(found["completion_ids"]), len(found["completion_logprobs"]))
    return answer(TOKENIZER.decode(found["completion_ids"], skip_special_tokens=True), ADAPTER)


@check("generate: sampled, with a seed")
def sampled():
    first, second = (asyncio.run(roll_out(temperature=1.0, seed=7, max_tokens=8)) for _ in range(2))
    same(first["completion_ids"], second["completion_ids"])
    return first["completion_logprobs"]


main()
