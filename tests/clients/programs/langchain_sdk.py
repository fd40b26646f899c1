"""langchain-openai: invoke, stream, bound tools, structured output."""

from typing import Literal

from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main, same
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


def chat(model, **more):
    return ChatOpenAI(model=model, base_url=V1, api_key="none", temperature=0, max_retries=0, **more)


class Fact(BaseModel):
    """A country and its capital."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


@tool
def capital_of(country: Literal["France", "Japan"]) -> str:
    """Look up the capital of a country."""
    return country


@check("invoke, base and adapter")
def invoke():
    for model in (BASE, ADAPTER):
        found = chat(model).invoke(QUESTION)
        answer(found.content, model)
    return found.content


@check("stream")
def stream():
    text = "".join(str(chunk.content) for chunk in chat(ADAPTER).stream(QUESTION))
    return answer(text, ADAPTER)


@check("bind_tools, tool_choice any")
def tools():
    found = chat(BASE, max_tokens=300).bind_tools([capital_of], tool_choice="any").invoke(QUESTION)
    same(found.tool_calls[0]["name"], "capital_of")
    return found.tool_calls


@check("with_structured_output")
def structured():
    for method in ("json_schema", "function_calling"):
        found = chat("json", max_tokens=300).with_structured_output(Fact, method=method).invoke(QUESTION)
        assert isinstance(found, Fact), found
    return found


@check("completions, batch")
def batch():
    llm = OpenAI(model=ADAPTER, base_url=V1, api_key="none", temperature=0, max_tokens=64, max_retries=0)
    texts = llm.batch([f"Q: {QUESTION}\nA:"] * 4)
    for text in texts:
        answer(text, ADAPTER)
    return texts[0]


main()
