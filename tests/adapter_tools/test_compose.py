"""Every way of combining adapters against PEFT's add_weighted_adapter, and what is refused.

Covers `combinations.py` and `methods.py` too.
"""

import json
from functools import partial

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from multilora import LLM
from multilora.adapter_tools.combinations import combine
from multilora.adapter_tools.compose import compose
from multilora.adapter_tools.methods import METHODS, RANDOM, SPARSE
from multilora.adapter_tools.pairs import LoraPair, read_pairs
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import AdapterUnsupported, ConfigError

TARGETS = ["q_proj", "v_proj"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # PEFT's and transformers' own


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    """An engine without a loader process."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("compose")
    make_tiny_model(path / "model")
    for name, seed, fields in (
        ("a", 1, {"r": 4, "lora_alpha": 8}),
        ("b", 2, {"r": 4, "lora_alpha": 2}),
        ("c", 3, {"r": 6, "lora_alpha": 6, "use_rslora": True}),
        ("dora", 4, {"r": 4, "use_dora": True}),
    ):
        make_adapter(path / name, path / "model", target_modules=TARGETS, seed=seed, **fields)
    return path


def by_peft(path, parts, method, **options):
    """The deltas of PEFT's own combination."""
    base = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    names = [name for name, _ in parts]
    model = PeftModel.from_pretrained(base, path / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(path / name, name)
    real, random = torch.bernoulli, torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # else PEFT draws from what has drawn the new adapter's weights
        patch.setattr(torch, "bernoulli", lambda input: real(input, generator=random))
        model.add_weighted_adapter(names, [w for _, w in parts], "new", combination_type=method, **options)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and "new" in m.lora_A}
    return {name: layer.get_delta_weight("new") for name, layer in layers.items()}


@pytest.mark.parametrize("method", METHODS)
def test_as_peft(path, tmp_path, method):
    parts = [("a", 0.7), ("b", -1.5)]
    options = {"density": 0.4} if method in SPARSE else {}
    named = [(str(path / name), weight) for name, weight in parts]
    found = compose(named, tmp_path / "new", method=method, **options)
    ours = {name: pair.delta() for name, pair in read_pairs(str(tmp_path / "new")).pairs.items()}
    theirs = by_peft(path, parts, method, **options)
    assert ours.keys() == theirs.keys() and found.modules == len(ours) == 4
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-4, atol=1e-6)
        assert float(delta.abs().max()) > 0


def test_the_sign_by_frequency(path, tmp_path):
    parts = [("a", 1.0), ("b", 1.0)]
    compose([(str(path / n), w) for n, w in parts], tmp_path / "new", method="ties", density=0.9, sign="frequency")
    ours = {name: pair.delta() for name, pair in read_pairs(str(tmp_path / "new")).pairs.items()}
    theirs = by_peft(path, parts, "ties", density=0.9, majority_sign_method="frequency")
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-4, atol=1e-6)


def test_cat_is_the_sum_whatever_the_ranks(path, tmp_path):
    names = ["a", "b", "c"]
    found = compose([(str(path / n), w) for n, w in zip(names, (1, 0.5, -2), strict=True)], tmp_path / "new")
    assert (found.rank, found.exact) == (14, True)
    new = read_pairs(str(tmp_path / "new"))
    each = [read_pairs(str(path / name)) for name in names]
    for name, pair in new.pairs.items():
        expected = sum(w * e.pairs[name].delta() for e, w in zip(each, (1, 0.5, -2), strict=True))
        torch.testing.assert_close(pair.delta(), expected, rtol=1e-5, atol=1e-6)


def test_it_can_be_served_and_is_the_composition_of_a_request(path, tmp_path):
    compose([(str(path / "a"), 1.0), (str(path / "b"), 0.5)], tmp_path / "new")
    paths = {"a": str(path / "a"), "b": str(path / "b"), "new": str(tmp_path / "new")}
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    with LLM(str(path / "model"), lora_paths=paths, skip_tokenizer_init=True, device="cpu") as llm:
        parts = [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 0.5}]
        asked, new, a = llm.generate([[5, 6, 7]] * 3, params, [parts, "new", "a"], return_logprob=True)
        assert new.token_ids == asked.token_ids and new.logprobs == pytest.approx(asked.logprobs, abs=1e-5)
        assert a.logprobs != pytest.approx(asked.logprobs, abs=1e-3)


def test_the_rank_of_svd(path, tmp_path):
    found = compose([(str(path / "a"), 1.0), (str(path / "c"), 1.0)], tmp_path / "new", method="svd", rank=2)
    assert found.rank == 2 and not found.exact
    ours = read_pairs(str(tmp_path / "new")).pairs
    theirs = by_peft(path, [("a", 1.0), ("c", 1.0)], "svd", svd_rank=2)
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name].delta(), delta, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_what_is_dropped(path, tmp_path):
    parts = [(str(path / "a"), 1.0), (str(path / "b"), 1.0)]
    found = []
    for i, seed in enumerate((1, 1, 2)):
        compose(parts, tmp_path / str(i), method="dare_linear", density=0.5, seed=seed)
        found.append(read_pairs(str(tmp_path / str(i))).pairs["model.layers.0.self_attn.q_proj"].a)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert set(RANDOM) == {m for m in METHODS if "dare" in m}


def test_the_config_says_what_the_matrices_are(path, tmp_path):
    compose([(str(path / "c"), 1.0)], tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert config["target_modules"] == TARGETS


def test_small_arithmetic_by_hand():
    one = LoraPair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 4.0)
    a, b = combine("linear", [one], [1.0], 1)
    assert (b @ a).tolist() == [[12.0, 24.0]]
    a, b = combine("cat", [one, one], [1.0, -1.0], 4)
    assert a.shape == (4, 2) and (b @ a).tolist() == [[0.0, 0.0]]
    a, b = combine("magnitude_prune_svd", [one], [1.0], 1, density=0.5)
    torch.testing.assert_close(b @ a, torch.tensor([[0.0, 24.0]]))


@pytest.mark.parametrize(
    ("names", "options", "error", "said"),
    [
        (["a", "c"], {"method": "linear"}, ConfigError, "needs adapters of one rank"),
        (["a"], {"method": "mean"}, ConfigError, "--method must be one of cat"),
        (["a"], {"method": "ties"}, ConfigError, "needs --density"),
        (["a"], {"method": "ties", "density": 1.5}, ConfigError, "--density"),
        (["a"], {"rank": 4}, ConfigError, "--rank is for"),
        (["a"], {"method": "svd", "rank": 0}, ConfigError, "--rank must be"),
        ([], {}, ConfigError, "no adapter"),
        (["a", "dora"], {}, AdapterUnsupported, "use_dora"),
    ],
)
def test_refusals(path, tmp_path, names, options, error, said):
    with pytest.raises(error, match=said):
        compose([(str(path / name), 1.0) for name in names], tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_adapters_of_different_models(path, tmp_path):
    make_tiny_model(tmp_path / "model", hidden_size=32)
    make_adapter(tmp_path / "d", tmp_path / "model", target_modules=TARGETS, r=4)
    with pytest.raises(ConfigError, match="for different models"):
        compose([(str(path / "a"), 1.0), (str(tmp_path / "d"), 1.0)], tmp_path / "new")
