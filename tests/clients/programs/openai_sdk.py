"""openai: completions and chat on the base model and on adapters, streams, tools, structured output, errors."""

import json
from typing import Literal

import openai
from checks import ADAPTER, BASE, PROMPT, QUESTION, V1, answer, check, main, same
from pydantic import BaseModel

client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]


class Fact(BaseModel):
    """What structured output has to look like."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


@check("completions")
def completions():
    for model in (BASE, ADAPTER):
        found = client.completions.create(model=model, prompt=PROMPT, max_tokens=64, temperature=0)
        answer(found.choices[0].text, model)
    return found.choices[0].text


@check("chat, base and adapter")
def chat():
    for model, name in ((BASE, BASE), (f"{BASE}:{ADAPTER}", ADAPTER), (ADAPTER, ADAPTER)):
        found = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0)
        answer(found.choices[0].message.content, name)
    return found.choices[0].message.content


@check("chat, stream with usage")
def stream():
    chunks = list(
        client.chat.completions.create(
            model=ADAPTER, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    answer("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), ADAPTER)
    assert chunks[-1].usage.completion_tokens > 0
    return chunks[-1].usage


@check("tools, required")
def tools():
    tool = {"type": "function", "function": {"name": "capital_of", "parameters": Fact.model_json_schema()}}
    found = client.chat.completions.create(
        model=BASE, messages=MESSAGES, tools=[tool], tool_choice="required", max_tokens=200
    )
    call = found.choices[0].message.tool_calls[0].function
    same(call.name, "capital_of")
    Fact.model_validate_json(call.arguments)
    return call.arguments


@check("chat.completions.parse")
def parse():
    found = client.chat.completions.parse(model="json", messages=MESSAGES, response_format=Fact, temperature=0)
    same(found.choices[0].message.parsed.capital, "Paris")
    return found.choices[0].message.parsed


@check("responses, whole and streamed")
def responses():
    found = client.responses.create(model=ADAPTER, input=QUESTION, temperature=0)
    answer(found.output_text, ADAPTER)
    with client.responses.stream(model=ADAPTER, input=QUESTION, temperature=0) as events:
        for _ in events:
            pass
        answer(events.get_final_response().output_text, ADAPTER)
    return found.output_text


@check("models")
def models():
    found = [model.id for model in client.models.list()]
    assert BASE in found and ADAPTER in found, found
    return json.dumps(found)


@check("unknown adapter: NotFoundError")
def unknown():
    try:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    except openai.NotFoundError as e:
        return e.body["message"]
    raise AssertionError("an unknown adapter was served")


main()
