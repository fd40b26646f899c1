"""pydantic-ai: plain text, a typed answer through tools, a stream."""

from typing import Literal

from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=V1, api_key="none")


class Fact(BaseModel):
    """What the answer is parsed into."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


def agent(model, **more):
    settings = {"temperature": 0.0, "max_tokens": 300}
    return Agent(OpenAIChatModel(model, provider=PROVIDER), model_settings=settings, **more)


@check("run, base and adapter")
def run():
    for model in (BASE, ADAPTER):
        found = agent(model).run_sync(QUESTION)
        answer(found.output, model)
    return found.output


@check("output_type (a required tool)")
def typed():
    return agent(BASE, output_type=Fact).run_sync(QUESTION).output


@check("run_stream")
def stream():
    import asyncio

    async def read():
        async with agent(ADAPTER).run_stream(QUESTION) as found:
            return [text async for text in found.stream_text()]

    return answer(asyncio.run(read())[-1], ADAPTER)


main()
