"""llama-index, OpenAILike: complete, chat, stream, tools, structured prediction."""

from typing import Literal

from checks import ADAPTER, BASE, PROMPT, QUESTION, V1, answer, check, main, same
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MESSAGES = [ChatMessage(role="user", content=QUESTION)]


class Fact(BaseModel):
    """A country and its capital."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


def llm(model, **more):
    more = {"is_chat_model": True, "context_window": 512, "max_tokens": 64} | more
    return OpenAILike(model=model, api_base=V1, api_key="none", temperature=0, max_retries=0, **more)


@check("complete")
def complete():
    found = llm(ADAPTER, is_chat_model=False).complete(PROMPT)
    return answer(found.text, ADAPTER)


@check("chat, base and adapter")
def chat():
    for model in (BASE, ADAPTER):
        found = llm(model).chat(MESSAGES)
        answer(found.message.content, model)
    return found.message.content


@check("stream_chat")
def stream():
    *_, last = llm(ADAPTER).stream_chat(MESSAGES)
    return answer(last.message.content, ADAPTER)


@check("chat_with_tools, tool_required")
def tools():
    def capital_of(country: Literal["France", "Japan"]) -> str:
        return country

    tool = FunctionTool.from_defaults(fn=capital_of, description="Look up a capital.")
    made = llm(BASE, is_function_calling_model=True, max_tokens=300)
    found = made.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    (call,) = made.get_tool_calls_from_response(found)
    same(call.tool_name, "capital_of")
    return call.tool_kwargs


@check("structured_predict")
def structured():
    made = llm(BASE, is_function_calling_model=True, max_tokens=300)
    return made.structured_predict(Fact, PromptTemplate("{question}"), question=QUESTION)


main()
