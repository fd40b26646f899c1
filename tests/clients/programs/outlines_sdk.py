"""outlines: text, JSON schema, stream, and vLLM's structured outputs (choice, regex)."""

import json
import re
from typing import Literal

import openai
import outlines
from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main
from pydantic import BaseModel

CLIENT = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)


class Fact(BaseModel):
    """What JSON has to look like."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


@check("from_openai: text and JSON")
def text():
    model = outlines.from_openai(CLIENT, ADAPTER)
    answer(model(QUESTION, temperature=0), ADAPTER)
    return Fact.model_validate_json(model(QUESTION, Fact, temperature=0, max_tokens=200))


@check("from_vllm: choice, regex, JSON")
def vllm():
    model = outlines.from_vllm(CLIENT, BASE)
    chosen = model(QUESTION, Literal["Paris", "Rome"], temperature=0, max_tokens=20)
    assert chosen in ("Paris", "Rome"), chosen
    found = model(QUESTION, outlines.types.Regex("[0-9]{4}"), temperature=0, max_tokens=20)
    assert re.fullmatch("[0-9]{4}", found), found
    fact = model(QUESTION, Fact, temperature=0, max_tokens=200)
    return f"{chosen}, {found}, {json.loads(fact)}"


@check("from_sglang: JSON")
def sglang():
    model = outlines.from_sglang(CLIENT, BASE)
    return Fact.model_validate_json(model(QUESTION, Fact, temperature=0, max_tokens=200))


main()
