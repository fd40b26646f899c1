"""SkyRL's Tinker server, driven by the `tinker` SDK: it trains on the CPU (its JAX backend) and samples from our
server, which finds each saved adapter by its name in --lora-resolver-dir. Nothing of SkyRL is replaced."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import tinker
from checks import ANSWERS, BASE, PROMPT, URL, answer, check, main
from tinker import types
from transformers import AutoTokenizer

MODEL = os.environ.get("MULTILORA_TOKENIZER", "")
PORT = os.environ.get("MULTILORA_SPARE_PORT", "0")
HERE = Path.cwd()  # an empty folder
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
LESSON = " Paris, said the owl. "
GREEDY = types.SamplingParams(max_tokens=32, temperature=0.0, stop=None)


def start():
    """Start the Tinker server. It starts its engine by the `uv run` that it was started by."""
    (HERE / BASE).symlink_to(MODEL)  # the base model has one name on both servers
    config = '{"max_lora_adapters": 2, "max_lora_rank": 8, "train_micro_batch_size": 1}'
    command = ["uv", "run", "--no-project", "--python", sys.executable, "-m", "skyrl.tinker.api",
               "--base-model", BASE, "--backend", "jax", "--backend-config", config,
               "--external-inference-url", URL,
               "--external-inference-lora-base", os.environ["MULTILORA_RESOLVER_DIR"],
               "--checkpoints-base", HERE / "saved", "--database-url", f"sqlite:///{HERE / 'tinker.db'}",
               "--host", "127.0.0.1", "--port", PORT]  # fmt: skip
    server = subprocess.Popen([str(part) for part in command], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    for _ in range(1000):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/v1/healthz", timeout=2)
            break
        except OSError:
            assert server.poll() is None, f"the Tinker server ended: {server.returncode}"
            time.sleep(0.5)
    return server


SERVER = start()
SERVICE = tinker.ServiceClient(base_url=f"http://127.0.0.1:{PORT}", api_key="tml-none")


def tokens(text):
    return TOKENIZER.encode(text)


def sample(client):
    prompt = types.ModelInput.from_ints(tokens(PROMPT))
    (sequence,) = client.sample(prompt=prompt, num_samples=1, sampling_params=GREEDY).result(timeout=300).sequences
    assert len(sequence.tokens) == len(sequence.logprobs), sequence
    return TOKENIZER.decode(sequence.tokens, skip_special_tokens=True)


@check("the base model is sampled")
def base():
    return answer(sample(SERVICE.create_sampling_client(base_model=BASE)), BASE)


@check("a LoRA is trained, saved, sampled and scored, twice")
def train():
    training = SERVICE.create_lora_training_client(base_model=BASE, rank=8, seed=0, train_unembed=False)
    whole = tokens(PROMPT + LESSON) + [TOKENIZER.eos_token_id]
    weights = [float(i >= len(tokens(PROMPT))) for i in range(1, len(whole))]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(whole[:-1]),
        loss_fn_inputs={"target_tokens": whole[1:], "weights": weights},
    )
    scores = []
    for version, steps in enumerate((2, 20)):
        for _ in range(steps):
            training.forward_backward([datum], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=5e-3)).result(timeout=300)
        client = training.save_weights_and_get_sampling_client(name=f"v{version}")
        found = sample(client)
        scored = client.compute_logprobs(types.ModelInput.from_ints(whole)).result(timeout=300)
        scores.append(sum(scored[len(tokens(PROMPT)) :]))
    assert scores[1] > scores[0] and scores[1] > -1, scores
    assert found.strip() == LESSON.strip() != ANSWERS[BASE], found
    return f"log-probability of what was taught: {scores[0]:.2f}, then {scores[1]:.2f}; answer {found!r}"


try:
    main()
finally:
    SERVER.terminate()
    SERVER.wait()
