"""Models through transformers' own modules, against transformers in fp32, in steps that mix chunks and decodes.

Covers `transformers_backend/modules.py`, `transformers_backend/materialize.py`, `transformers_backend/tree.py`,
`transformers_backend/weights.py`, `transformers_backend/refused.py` too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from fakes.layer_context import BASE
from paged_driver import Driver, Sequence
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from multilora.distributed.group import SINGLE
from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.linear import Linear
from multilora.models.base import CausalLM
from multilora.models.llama import LlamaForCausalLM
from multilora.models.load import make_model
from multilora.models.transformers_backend.model import TransformersCausalLM
from multilora.models.transformers_backend.modules import TreeGateUp, TreeLinear, TreeNorm, TreeSiblings
from multilora.models.transformers_backend.probe import is_mixture

CPU = torch.device("cpu")
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "llama, tied": ("LlamaForCausalLM", "llama", {"tie_word_embeddings": True}),
    "conv1d": ("GPT2LMHeadModel", "gpt2", {}),
    "windows by layer and softcap": ("Gemma2ForCausalLM", "gemma2", {}),
    "sinks and experts": ("GptOssForCausalLM", "gpt_oss", {}),
    "keys and values of different widths": ("DeepseekV2ForCausalLM", "deepseek_v2", {}),
    "a head with a bias": ("PhiForCausalLM", "phi", {}),
    "an inner decoder": ("OPTForCausalLM", "opt", {}),
    "biases on some of the siblings": (
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {"q_lora_rank": None, "attention_bias": True},
    ),
    "a layer that attends twice": ("DiffLlamaForCausalLM", "diffllama", {}),
}


MIXED = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 12}


def make(path: Path, architecture: str, model_type: str, **fields: Any) -> Any:
    """Write a tiny model; returns transformers' own."""
    config = tiny_config(model_type, architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    tiny_model(architecture, config).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def served(path: Path, impl: str = "transformers", **options: Any) -> CausalLM:
    model = make_model(str(path), device=CPU, model_impl=impl, **options)
    model.load(str(path), load_format="auto", revision=None, seed=0)
    return model


@torch.inference_mode()
def expected(reference: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = reference(torch.tensor([tokens])).logits[0].float()
    return logits


def check_equal(reference: Any, model: CausalLM, attention: str = "torch") -> None:
    texts = [[3 + (7 * i + i * i) % 90 for i in range(length)] for length in (41, 20)]
    driver, seqs = Driver(model, attention), [Sequence(text) for text in texts]
    parts: list[list[torch.Tensor]] = [[], []]
    for counts in ((7, 0), (1, 9), (1, 1), (20, 1), (12, 9)):
        work = [(i, n) for i, n in enumerate(counts) if n]
        for (i, _), logits in zip(work, driver.step([(seqs[i], n) for i, n in work]), strict=True):
            parts[i].append(logits)
    for text, found in zip(texts, parts, strict=True):
        want = expected(reference, text)
        torch.testing.assert_close(torch.cat(found), want, atol=float(1e-5 * want.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    architecture, model_type, fields = CASES[case]
    reference = make(tmp_path, architecture, model_type, **fields)
    model = served(tmp_path)
    assert isinstance(model, TransformersCausalLM)
    check_equal(reference, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["windows by layer and softcap", "sinks and experts", "keys and values of different widths"]
)
def test_the_triton_backend_serves_what_flashinfer_does_not(case: str, tmp_path: Path) -> None:
    """In Triton's interpreter here; tests/engine/test_triton_attention.py has a GPU's."""
    pytest.importorskip("triton")
    architecture, model_type, fields = CASES[case]
    reference = make(tmp_path, architecture, model_type, **fields)
    check_equal(reference, served(tmp_path), "triton")


def test_auto_takes_native_where_it_serves_and_transformers_where_it_does_not(tmp_path: Path) -> None:
    make(tmp_path / "native", "LlamaForCausalLM", "llama")
    assert isinstance(make_model(str(tmp_path / "native"), device=CPU), LlamaForCausalLM)
    mixed = make(tmp_path / "mixed", "Qwen3ForCausalLM", "qwen3", **MIXED)
    model = served(tmp_path / "mixed", "auto")
    assert model.attention_shape.layer_windows == (None, 12)
    check_equal(mixed, model)
    with pytest.raises(ModelUnsupported, match="layer_types"):
        make_model(str(tmp_path / "mixed"), device=CPU, model_impl="native")


def test_every_linear_layer_is_a_site_under_its_own_name(tmp_path: Path) -> None:
    reference = make(tmp_path, "GPT2LMHeadModel", "gpt2")
    model = make_model(str(tmp_path), device=torch.device("meta"))
    assert model.layers_path == "transformer.h"
    modules = {s.module for site in model.lora_sites() for s in site.slices}
    assert modules == {"embed_tokens", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head"}
    assert model.config.tie_word_embeddings
    assert sum(isinstance(m, Linear) for m in model.modules()) == 8
    assert model.weight_bytes == sum(p.nbytes for p in reference.parameters())


def modules_of(model: CausalLM, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m) is kind]


def test_common_parts_are_ours(tmp_path: Path) -> None:
    make(tmp_path / "llama", "LlamaForCausalLM", "llama")
    llama = served(tmp_path / "llama")
    names = [site.name for site in llama.lora_sites() if site.layer == 0]
    assert names == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    assert [len(modules_of(llama, kind)) for kind in (TreeSiblings, TreeGateUp, TreeLinear, TreeNorm)] == [2, 2, 4, 5]
    assert not llama.without_adapters()
    make(tmp_path / "gemma", "Gemma2ForCausalLM", "gemma2")
    gemma = served(tmp_path / "gemma")
    assert [len(modules_of(gemma, kind)) for kind in (TreeSiblings, TreeGateUp, TreeLinear, TreeNorm)] == [4, 0, 4, 9]


def test_a_layer_that_attends_twice_says_so(tmp_path: Path) -> None:
    make(tmp_path / "diff", "DiffLlamaForCausalLM", "diffllama")
    make(tmp_path / "llama", "LlamaForCausalLM", "llama")
    assert not served(tmp_path / "diff").attends_one_by_one and served(tmp_path / "llama").attends_one_by_one


def test_siblings_multiply_once_for_all_and_again_for_another_tensor(tmp_path: Path) -> None:
    make(tmp_path, "LlamaForCausalLM", "llama")
    model = served(tmp_path)
    layer: Any = model.get_submodule("lm.model.layers.0.self_attn")
    siblings, step = layer.get_submodule("q_proj+k_proj+v_proj"), layer.paged_attention._step
    step.context = BASE
    weight, inputs = siblings.weight.data, torch.randn(2, 1, 3, 64)
    products = []
    siblings.register_forward_hook(lambda *_: products.append(1))
    for x in inputs:
        wanted = (x @ weight.T).split([64, 32, 32], dim=-1)
        for module, want in zip((layer.q_proj, layer.k_proj, layer.v_proj), wanted, strict=True):
            torch.testing.assert_close(module(x), want)
    assert len(products) == 2
    torch.testing.assert_close(layer.k_proj(inputs[0]), (inputs[0] @ weight.T)[..., 64:96])
    torch.testing.assert_close(layer.k_proj(inputs[1]), (inputs[1] @ weight.T)[..., 64:96])
    assert layer.q_proj.weight is siblings.weight


def test_ranks_do_not_divide_what_transformers_has_no_plan_for(tmp_path: Path) -> None:
    class TwoRanks:
        size, rank = 2, 0

    make(tmp_path, "GPT2LMHeadModel", "gpt2")
    with pytest.raises(ConfigError, match=r"--tp-size 2: GPT2LMHeadModel .*, and transformers has no plan"):
        make_model(str(tmp_path), device=CPU, group=TwoRanks())  # type: ignore[arg-type]
    assert SINGLE.size == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.weight"), "lacks transformer.h.1.attn.c_attn.weight"),
        (lambda t: t.update({"transformer.h.1.stray": torch.zeros(1)}), "holds transformer.h.1.stray"),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.zeros(3)}),
            r"transformer.ln_f.weight has shape \[3\], the config asks for \[64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path, "GPT2LMHeadModel", "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=said):
        served(tmp_path)


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", 1), ("float16", 1), ("float32", 0)])
def test_what_transformers_keeps_in_fp32_stays_so(dtype: str, wide: int, tmp_path: Path) -> None:
    make(tmp_path, "DeepseekV3ForCausalLM", "deepseek_v3")
    model = make_model(str(tmp_path), device=CPU, dtype=dtype)
    kept = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    if wide:
        assert kept == ["lm.model.layers.1.mlp.gate.weight"]
    assert {s.module for site in model.lora_sites() for s in site.slices}.isdisjoint({"gate"})


def test_dummy_weights(tmp_path: Path) -> None:
    make(tmp_path, "GPT2LMHeadModel", "gpt2")
    model = make_model(str(tmp_path), device=CPU)
    model.load(str(tmp_path), load_format="dummy", revision=None, seed=1)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mixtures_are_examined_and_captured_whatever_torch_multiplies(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device torch's grouped product takes bfloat16 alone. Modules are those of transformers 5.17, which
    lack a mark that later ones have."""
    made = GptOssExperts.__init__

    def made_earlier(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        vars(self).pop("_is_expert_parallel", None)

    monkeypatch.setattr(GptOssExperts, "__init__", made_earlier)
    tiny_config("gpt_oss", "GptOssForCausalLM").save_pretrained(tmp_path)
    model = make_model(str(tmp_path), device=torch.device("meta"), dtype=dtype)
    assert isinstance(model, TransformersCausalLM) and not model.capturable
    model.device = torch.device("cuda")
    for capability, fast in (((9, 0), dtype == "bfloat16"), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert model.capturable == fast
    next(filter(is_mixture, model.lm.modules())).config._experts_implementation = "eager"
    assert not model.capturable


def test_mixtures_that_are_ours_are_captured_whatever_transformers_would_multiply_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("gpt_oss", "GptOssForCausalLM").save_pretrained(tmp_path)
    model = make_model(str(tmp_path), device=torch.device("meta"), dtype="bfloat16")
    model.device = torch.device("cuda")
    next(filter(is_mixture, model.modules())).config._experts_implementation = "eager"
    for capability, fast in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert model.capturable == fast
    assert {path.rpartition(".")[2] for path in model.without_adapters()} == {"router", "self_attn"}  # its sinks
