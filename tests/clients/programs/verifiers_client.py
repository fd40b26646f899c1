"""verifiers, prime-rl's environments: its training client (token ids over /inference/v1/generate) and its evaluation
client (chat completions passed on), each for one turn and the training client for two adapters."""

import asyncio
import os

from checks import ADAPTER, QUESTION, V1, answer, check, main, same

os.environ["OURS_KEY"] = "none"
from verifiers.v1.clients.eval import EvalClient
from verifiers.v1.clients.train import TrainClient
from verifiers.v1.configs.client import EvalClientConfig, TrainClientConfig
from verifiers.v1.dialects.chat import ChatDialect
from verifiers.v1.types import SamplingConfig

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")


async def ask(client, model, **sampling):
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], **sampling}
    return await client.get_response(ChatDialect(), body, SamplingConfig(**sampling), session_id="rollout-1")


@check("TrainClient: token ids and log-probabilities of two adapters")
def train():
    async def both():
        endpoint = TrainClientConfig(base_url=V1, api_key_var="OURS_KEY", renderer_model_name=TOKENIZER)
        client = TrainClient(endpoint)
        return [(model, await ask(client, model, temperature=0.0, max_tokens=64)) for model in (ADAPTER, "french")]

    for model, found in asyncio.run(both()):
        answer(found.message.content, model)
        tokens = found.tokens
        same(len(tokens.completion_ids), len(tokens.completion_logprobs))
        assert all(-1 < logprob <= 0 for logprob in tokens.completion_logprobs), tokens
    return tokens.completion_logprobs[:3]


@check("EvalClient: a chat passed on")
def evaluate():
    async def one():
        client = EvalClient(EvalClientConfig(base_url=V1, api_key_var="OURS_KEY"))
        return await ask(client, ADAPTER, temperature=0.0, max_tokens=64)

    return answer(asyncio.run(one()).message.content, ADAPTER)


main()
