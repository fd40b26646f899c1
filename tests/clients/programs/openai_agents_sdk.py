"""openai-agents: an agent over the Responses API (its default) and over chat, with a function tool, and streamed."""

import asyncio
from typing import Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as tracing_disabled
from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main
from openai import AsyncOpenAI

tracing_disabled(True)
called = []


@function_tool
def capital_of(country: Literal["France", "Japan"]) -> str:
    """Look up the capital of a country."""
    called.append(country)
    return "Paris"


def agent(kind, model, **more):
    settings = ModelSettings(temperature=0, max_tokens=200, **more.pop("settings", {}))
    client = AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)  # belongs to one event loop
    return Agent(name="test", model=kind(model=model, openai_client=client), model_settings=settings, **more)


@check("Responses, base and adapter")
def responses():
    for model in (BASE, ADAPTER):
        found = Runner.run_sync(agent(OpenAIResponsesModel, model), QUESTION)
        answer(found.final_output, model)
    return found.final_output


@check("Responses, streamed")
def streamed():
    async def read():
        found = Runner.run_streamed(agent(OpenAIResponsesModel, ADAPTER), QUESTION)
        kinds = {event.type async for event in found.stream_events()}
        assert "raw_response_event" in kinds, kinds
        return found.final_output

    return answer(asyncio.run(read()), ADAPTER)


@check("Responses, a function tool is called and its result goes back")
def tool():
    called.clear()
    made = agent(OpenAIResponsesModel, BASE, tools=[capital_of], settings={"tool_choice": "required"})
    found = Runner.run_sync(made, QUESTION, max_turns=4)
    assert called, "the tool was not called"
    return f"capital_of{called!r}, then {found.final_output!r}"


@check("chat completions")
def chat():
    found = Runner.run_sync(agent(OpenAIChatCompletionsModel, ADAPTER), QUESTION)
    return answer(found.final_output, ADAPTER)


main()
