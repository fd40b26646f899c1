"""Which adapters leave keys and values alone, and that a prefix is then shared with the base model, exactly."""

from pathlib import Path

import pytest
import torch
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from transformers import AutoModelForCausalLM

from multilora.adapters.composition.kv_invariance import leaves_kv
from multilora.adapters.peft.base_model import BaseModel
from multilora.lora.panels import AdapterShape, FullWeightShape, ScaleShift
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice, NormModule

BEFORE_KV = ("embed_tokens", "k_proj", "v_proj", "input_layernorm", "k_norm")


def site(index: int, layer: int, name: str, *modules: str) -> LoraSite:
    slices = (LoraSlice(m, 16 * i, 16, before_kv=m in BEFORE_KV) for i, m in enumerate(modules))
    return LoraSite(index, layer, name, 16, tuple(slices))


SITES = (
    site(0, 0, "qkv_proj", "q_proj", "k_proj", "v_proj"),
    site(1, 0, "o_proj", "o_proj"),
    site(2, 1, "qkv_proj", "q_proj", "k_proj", "v_proj"),
    site(3, 1, "o_proj", "o_proj"),
    site(4, MODEL_LEVEL, "embed_tokens", "embed_tokens"),
    site(5, MODEL_LEVEL, "lm_head", "lm_head"),
)

NORMS = tuple(
    NormModule(layer, module, "", 16, module in BEFORE_KV)
    for layer, modules in (
        (0, ("input_layernorm", "post_attention_layernorm")),
        (1, ("input_layernorm", "post_attention_layernorm", "k_norm", "q_norm")),
        (MODEL_LEVEL, ("norm",)),
    )
    for module in modules
)
BASE = BaseModel(SITES, NORMS, vocab_size=16, hidden_size=16, tie_word_embeddings=False)


def shape(
    *acts: tuple[int, int], scale_shift: bool = False, full_weights: tuple[FullWeightShape, ...] = ()
) -> AdapterShape:
    table = tuple(tuple(int((s.index, i) in acts) for i in range(len(s.slices))) for s in SITES)
    empty = tuple((0,) * len(s.slices) for s in SITES)
    kinds = tuple(tuple(int(ScaleShift.BIAS) * v for v in row) for row in table)
    return AdapterShape(empty, kinds, full_weights) if scale_shift else AdapterShape(table, (), full_weights)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(
    ("acts", "leaves"),
    [
        ([(2, 0)], True),  # the last layer's q
        ([(3, 0), (5, 0), (2, 0)], True),
        ([(2, 1)], False),  # its k
        ([(2, 2)], False),
        ([(0, 0)], False),  # an earlier layer's q
        ([(1, 0), (5, 0)], False),
        ([(4, 0)], False),  # the embedding
    ],
)
def test_what_leaves_them_alone(acts, leaves, scale_shift):
    assert leaves_kv(shape(*acts, scale_shift=scale_shift), BASE) is leaves


@pytest.mark.parametrize(
    ("layer", "module", "leaves"),
    [
        (MODEL_LEVEL, "lm_head", True),
        (MODEL_LEVEL, "norm", True),
        (MODEL_LEVEL, "embed_tokens", False),
        (1, "post_attention_layernorm", True),
        (1, "input_layernorm", False),
        (1, "k_norm", False),
        (1, "q_norm", True),
        (0, "post_attention_layernorm", False),
    ],
)
def test_whole_modules(layer, module, leaves):
    assert leaves_kv(shape((3, 0), full_weights=(FullWeightShape(layer, module, 1, 16),)), BASE) is leaves


def test_a_cached_prefix_of_base_serves_the_adapter_exactly(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_tiny_model(base, "llama", seed=3)
    behind = {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1]}
    reference = make_adapter(tmp_path / "behind", base, seed=1, **behind, modules_to_save=["lm_head"])
    make_adapter(tmp_path / "before", base, seed=1, **behind | {"target_modules": ["v_proj"]})
    driver = EngineDriver(base, {n: tmp_path / n for n in ("behind", "before")}, page_size=4)
    prompt = [5, 9, 40, 8, 77, 12, 30, 31, 6]

    def ask(adapter: str | None) -> tuple[list[int], int]:
        rid = driver.submit(prompt, adapter, max_new_tokens=6)
        driver.run()
        return driver.answers[rid].tokens, driver.answers[rid].cached_tokens

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = {}
    for name, model in ((None, plain), ("behind", reference)):
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        expected[name] = out[0, len(prompt) :].tolist()
    assert expected[None] != expected["behind"]
    assert ask(None) == (expected[None], 0)
    assert ask("before")[1] == 0
    assert ask("behind") == (expected["behind"], 8)
    assert ask(None) == (expected[None], 8)
