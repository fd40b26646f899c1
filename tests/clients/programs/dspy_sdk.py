"""dspy: a raw call of the language model, and a signature by the JSON schema of a provider declared to enforce it."""

import dspy
from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider


def lm(model, **more):
    return dspy.LM(f"openai/{model}", api_base=V1, api_key="none", cache=False, num_retries=0, **more)


@check("LM, base and adapter")
def raw():
    for model in (BASE, ADAPTER):
        (found,) = lm(model, temperature=0.0, max_tokens=64)(QUESTION)
        answer(found if isinstance(found, str) else found["text"], model)
    return found


@check("Predict over JSONAdapter (a JSON schema is enforced)")
def predict():
    access = AccessPolicy(provider="ours", env_keys=(), base_url=V1)
    definition = ProviderDefinition.chat(access, compat=OpenAIChatCompat(), placeholder_key="none")
    register_provider(definition, supports=ModelSupport(response_schema=True))
    ours = dspy.LM(f"ours/{BASE}", cache=False, num_retries=0, temperature=0.0, max_tokens=200)
    with dspy.context(lm=ours, adapter=dspy.JSONAdapter()):
        found = dspy.Predict("question -> answer: bool")(question="Yes?")
    assert isinstance(found.answer, bool), found
    return found.answer


main()
