"""smolagents: an OpenAI model, whole, streamed, and with tools (which it requires)."""

from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main, same
from smolagents import OpenAIServerModel, tool
from smolagents.models import ChatMessage, MessageRole

MESSAGES = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]


def model(name, **more):
    return OpenAIServerModel(model_id=name, api_base=V1, api_key="none", temperature=0, **more)


@tool
def sunny(tomorrow: bool) -> bool:
    """Say whether the sun shines.

    Args:
        tomorrow: tomorrow instead of today
    """
    return tomorrow


@check("generate, base and adapter")
def generate():
    for name in (BASE, ADAPTER):
        found = model(name).generate(MESSAGES)
        answer(found.content, name)
    return found.content


@check("generate_stream")
def stream():
    text = "".join(delta.content or "" for delta in model(ADAPTER).generate_stream(MESSAGES))
    return answer(text, ADAPTER)


@check("tools_to_call_from")
def tools():
    found = model(BASE, max_tokens=300).generate(MESSAGES, tools_to_call_from=[sunny])
    same(found.tool_calls[0].function.name, "sunny")
    return found.tool_calls[0].function


main()
