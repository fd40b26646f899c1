"""anthropic: messages whole and streamed, tools, token counts, on the base model and on an adapter."""

import anthropic
from checks import ADAPTER, BASE, QUESTION, URL, answer, check, main, same

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
ASK = {"max_tokens": 64, "messages": MESSAGES, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "capital_of",
    "description": "Look up a capital.",
    "input_schema": {
        "type": "object",
        "properties": {"country": {"enum": ["France", "Japan"]}},
        "required": ["country"],
    },
}


@check("messages")
def messages():
    for model in (BASE, ADAPTER):
        found = client.messages.create(model=model, **ASK)
        answer(found.content[0].text, model)
    return found.content[0].text


@check("messages, stream")
def stream():
    with client.messages.stream(model=ADAPTER, **ASK) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    answer(text, ADAPTER)
    same(final.stop_reason, "end_turn")
    return final.usage


@check("tool use")
def tool():
    ask = ASK | {"max_tokens": 300}
    found = client.messages.create(
        model=BASE, tools=[TOOL], tool_choice={"type": "tool", "name": "capital_of"}, **ask
    )
    (use,) = [block for block in found.content if block.type == "tool_use"]
    same(use.name, "capital_of")
    assert use.input["country"] in ("France", "Japan"), use
    return use.input


@check("count_tokens")
def count():
    found = client.messages.count_tokens(model=ADAPTER, messages=MESSAGES)
    assert found.input_tokens > 5
    return found.input_tokens


@check("unknown adapter: NotFoundError")
def unknown():
    try:
        client.messages.create(model="nobody", **ASK)
    except anthropic.NotFoundError as e:
        return same("nobody" in e.message, True)
    raise AssertionError("an unknown adapter was served")


main()
