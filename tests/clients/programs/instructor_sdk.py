"""instructor: a typed answer through its default mode (a required tool) and through JSON schema."""

from typing import Literal

import instructor
from checks import BASE, QUESTION, V1, check, main
from openai import OpenAI
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": QUESTION}]


class Fact(BaseModel):
    """What the answer is parsed into."""

    country: Literal["France", "Japan"]
    capital: Literal["Paris", "Tokyo"]


def ask(mode):
    client = instructor.from_openai(OpenAI(base_url=V1, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(
        model=BASE, messages=MESSAGES, response_model=Fact, max_retries=0, max_tokens=300, temperature=0
    )


@check("mode TOOLS (the default)")
def tools():
    return ask(instructor.Mode.TOOLS)


@check("mode JSON_SCHEMA")
def schema():
    return ask(instructor.Mode.JSON_SCHEMA)


main()
