"""litellm's SDK: openai/ and hosted_vllm/ routes, streams, the exception for prompts that are too long."""

import litellm
from checks import ADAPTER, BASE, PROMPT, QUESTION, V1, answer, check, main

MESSAGES = [{"role": "user", "content": QUESTION}]
ASK = {"api_base": V1, "api_key": "none", "temperature": 0, "num_retries": 0}


@check("completion, openai/ and hosted_vllm/")
def completion():
    for provider in ("openai", "hosted_vllm"):
        for model in (BASE, ADAPTER):
            found = litellm.completion(model=f"{provider}/{model}", messages=MESSAGES, **ASK)
            answer(found.choices[0].message.content, model)
    return found.choices[0].message.content


@check("completion, stream")
def stream():
    chunks = litellm.completion(model=f"openai/{ADAPTER}", messages=MESSAGES, stream=True, **ASK)
    return answer("".join(chunk.choices[0].delta.content or "" for chunk in chunks), ADAPTER)


@check("text_completion")
def text():
    found = litellm.text_completion(model=f"text-completion-openai/{ADAPTER}", prompt=PROMPT, max_tokens=64, **ASK)
    return answer(found.choices[0].text, ADAPTER)


@check("too long: ContextWindowExceededError")
def too_long():
    try:
        litellm.completion(model=f"openai/{BASE}", messages=[{"role": "user", "content": "word " * 5000}], **ASK)
    except litellm.ContextWindowExceededError as e:
        return e.message
    raise AssertionError("a prompt beyond the context was served")


@check("responses")
def responses():
    found = litellm.responses(model=f"openai/{ADAPTER}", input=QUESTION, api_base=V1, api_key="none", temperature=0)
    return answer(found.output[0].content[0].text, ADAPTER)


main()
