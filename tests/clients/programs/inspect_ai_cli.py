"""inspect-ai: an evaluation of two samples through its OpenAI-compatible provider and through its vLLM provider."""

import os
import tempfile

from checks import ADAPTER, QUESTION, V1, check, main, same

os.environ |= {"INSPECT_LOG_DIR": tempfile.mkdtemp(), "OURS_API_KEY": "none", "OURS_BASE_URL": V1}
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes


def accuracy(model):
    task = Task(
        dataset=[Sample(input=QUESTION, target="matey"), Sample(input=QUESTION, target="Rome")], scorer=includes()
    )
    (log,) = evaluate(task, model=model, display="none", max_tokens=64, temperature=0.0)
    same(log.status, "success")
    return log.results.scores[0].metrics["accuracy"].value


@check("eval, openai-api provider")
def openai_api():
    return same(accuracy(f"openai-api/ours/{ADAPTER}"), 0.5)


@check("eval, vllm provider")
def vllm():
    return same(accuracy(get_model(f"vllm/{ADAPTER}", base_url=V1, api_key="none")), 0.5)


main()
