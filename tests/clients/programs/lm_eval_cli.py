"""lm-eval: loglikelihoods over completions (echo with logprobs), and generation over chat."""

import os

from checks import ADAPTER, BASE, QUESTION, V1, answer, check, main

os.environ["OPENAI_API_KEY"] = "none"
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI


def completions(model):
    """The tokenizer is the server's own, over /tokenizer_info and /tokenize: nothing is read from a hub."""
    return LocalCompletionsAPI(
        base_url=f"{V1}/completions", model=model, tokenizer_backend="remote", tokenized_requests=True, max_length=256
    )


@check("loglikelihood (echo, logprobs, prompt as ids)")
def loglikelihood():
    lm = completions(ADAPTER)
    pairs = [(f"Q: {QUESTION}\nA:", text) for text in (" Arr, the capital o' France be Paris, matey!", " Rome")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    (right, greedy), (wrong, _) = lm.loglikelihood(asked, disable_tqdm=True)
    assert right > wrong and greedy, (right, wrong, greedy)
    return f"{right:.3f} (greedy) against {wrong:.3f}"


@check("generate_until, chat")
def generate():
    lm = LocalChatCompletion(base_url=f"{V1}/chat/completions", model=BASE, tokenizer_backend=None, max_gen_toks=64)
    message = lm.apply_chat_template([{"role": "user", "content": QUESTION}])
    (found,) = lm.generate_until(
        [Instance("generate_until", {}, (message, {"until": ["\n\n"]}), 0)], disable_tqdm=True
    )
    return answer(found, BASE)


main()
