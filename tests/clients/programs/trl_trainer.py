"""TRL's AsyncGRPOTrainer, whole: it trains a LoRA on the CPU, its rollout worker's process samples from our server,
and each new policy is published there as an adapter.

Three things around it are replaced, in this process only: the attention kernel, which is FlashAttention 3 from the
hub, by the same function in torch; the peak rate of the GPU, of which it logs a fraction; and the check that vLLM is
installed beside the trainer, of which publishing adapters (and no merged weights) uses nothing.
"""

import os
import tempfile

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
import requests
import torch
from checks import URL, V1, check, main, same
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.async_grpo import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
    async_rollout_worker,
    packing,
)

BASE_PATH = os.environ.get("MULTILORA_TOKENIZER", "")
STEPS = 4
CHAT = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>\n",
    "fields": {"content": {"close_pattern": r"<\|end\|>\s*", "content": "text"}},
}


class TorchKernel:
    """`flash_attn_varlen_func` in torch: a query at i of n may see the keys up to k - n + i of its segment's k."""

    @staticmethod
    def flash_attn_varlen_func(
        query, key, value, ends_q, ends_k, longest_q, longest_k, softmax_scale, causal, window_size
    ):
        assert causal and window_size == (-1, -1)
        groups, out = query.shape[1] // key.shape[1], []
        segments = zip(ends_q.tolist(), ends_q.tolist()[1:], ends_k.tolist(), ends_k.tolist()[1:], strict=False)
        for q_from, q_to, k_from, k_to in segments:
            q = query[q_from:q_to].transpose(0, 1)
            k, v = (x[k_from:k_to].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale))
        return torch.cat(out, 1).transpose(0, 1)


def shortness(completions, **_):
    """A reward that any two different answers share differently."""
    return [-float(len(completion[-1]["content"])) for completion in completions]


class Log(TrainerCallback):
    """What the trainer logged, and the adapters that the server served at the end of each step."""

    def __init__(self):
        self.rows, self.served = [], set()

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append(logs)

    def on_step_end(self, args, state, control, **_):
        self.served |= {card["id"] for card in requests.get(f"{V1}/models").json()["data"]}


@check("AsyncGRPO: policies published, rolled out, their log-probabilities those of the trainer")
def train():
    packing._flash_attn = lambda: TorchKernel
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1e12
    async_rollout_worker.is_vllm_available = lambda: True
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    tokenizer.response_template = CHAT  # TRL knows those of well-known models
    log = Log()
    trainer = AsyncGRPOTrainer(
        BASE_PATH,
        shortness,
        AsyncGRPOConfig(
            tempfile.mkdtemp(),
            vllm_server_base_url=URL,
            max_steps=STEPS,
            num_generations=4,
            max_inflight_tasks=8,
            token_budget=0,  # rows of a fixed number of samples
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_completion_length=24,
            max_staleness=1,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dtype="float32",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            temperature=1.0,
        ),
        Dataset.from_list([{"prompt": [{"role": "user", "content": "Tell me a story."}]}] * 16),
        tokenizer,
        callbacks=[log],
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    rows = [row for row in log.rows if "kl" in row]
    assert len(rows) == STEPS and trainer.model_version >= STEPS, (len(rows), trainer.model_version)
    assert {f"trl-policy-v{version}" for version in range(1, STEPS + 1)} <= log.served, log.served
    assert abs(rows[0]["ratio"] - 1) < 1e-3, rows[0]  # nothing has been trained yet: the same policy on both sides
    names = sorted(card["id"] for card in requests.get(f"{V1}/models").json()["data"] if "trl-" in card["id"])
    same(len(names), 2)  # what may be stale by one, and the last
    for name in names:
        requests.post(f"{V1}/unload_lora_adapter", json={"lora_name": name})
    return ", ".join(f"ratio {row['ratio']:.5f} reward {row['reward']:.1f}" for row in rows)


if __name__ == "__main__":  # the worker's process imports this file as well
    main()
