"""One adapter in every writer's format becomes the same adapter again, as PEFT computes it; who wrote it is found
out.

Covers `convert/found.py`, `convert/convert.py` and `convert/llama_cpp.py` too.
"""

import json

import gguf
import numpy as np
import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.adapter_tools.convert.convert import convert
from multilora.adapter_tools.convert.llama_cpp import in_order
from multilora.adapter_tools.inspect import inspect
from multilora.adapter_tools.pairs import read_pairs
from multilora.errors import AdapterInvalid, AdapterNotFound, AdapterUnsupported, ConfigError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = dict(
    zip(TARGETS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert")
    make_tiny_model(path / "llama")
    make_tiny_model(path / "qwen3", "qwen3")
    for family in ("llama", "qwen3"):
        make_adapter(path / f"{family}-adapter", path / family, target_modules=TARGETS, r=4, lora_alpha=8)
    return path


@pytest.fixture(scope="module")
def pairs(path):
    return read_pairs(str(path / "llama-adapter")).pairs


def same(folder, expected, model=None):
    """The directory holds these pairs, and a server takes it."""
    found = read_pairs(str(folder)).pairs
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(found[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)
    if model is not None:
        report = inspect(str(folder), str(model))
        assert report.compatible, report.error


def flat(module):
    return f"lora_te_{module.replace('.', '_')}"


@pytest.mark.parametrize("with_model", [True, False])
def test_kohya(path, pairs, tmp_path, with_model):
    tensors = {f"{flat(m)}.lora_down.weight": p.a for m, p in pairs.items()}
    tensors |= {f"{flat(m)}.lora_up.weight": p.b for m, p in pairs.items()}
    tensors |= {f"{flat(m)}.alpha": torch.tensor(8.0) for m in pairs}
    save_file(tensors, tmp_path / "lora.safetensors")
    model = str(path / "llama") if with_model else None
    found = convert(str(tmp_path / "lora.safetensors"), tmp_path / "out", model_path=model)
    assert (found.writer, found.modules, found.tensors) == ("kohya", 14, 28)
    same(tmp_path / "out", pairs, path / "llama")


def test_mlx(path, pairs, tmp_path):
    source = tmp_path / "mlx"
    source.mkdir()
    tensors = {f"{m}.lora_a": p.a.T.contiguous() for m, p in pairs.items()}
    tensors |= {f"{m}.lora_b": p.b.T.contiguous() for m, p in pairs.items()}
    save_file(tensors, source / "adapters.safetensors")
    save_file({"model.x.lora_a": torch.zeros(1)}, source / "0000100_adapters.safetensors")  # a checkpoint beside it
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert convert(str(source), tmp_path / "out").writer == "MLX"
    same(tmp_path / "out", pairs, path / "llama")


def test_a_pickle_with_wrappers(path, pairs, tmp_path):
    """As Axolotl leaves it with FSDP and torch.compile."""
    source = tmp_path / "axolotl"
    source.mkdir()
    original = load_file(path / "llama-adapter" / "adapter_model.safetensors")
    wrapped = {
        n.replace("model.layers", "_orig_mod.model.layers").replace("self_attn", "_fsdp_wrapped_module.self_attn"): t
        for n, t in original.items()
    }
    torch.save(wrapped, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text((path / "llama-adapter" / "adapter_config.json").read_text())
    found = convert(str(source), tmp_path / "out")
    assert found.writer == "PEFT" and "names of wrappers" in found.notes[0]
    same(tmp_path / "out", pairs, path / "llama")


def test_without_a_config(path, pairs, tmp_path):
    source = path / "llama-adapter" / "adapter_model.safetensors"
    lonely = tmp_path / "lora.safetensors"
    lonely.write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match="--alpha"):
        convert(str(lonely), tmp_path / "out")
    convert(str(lonely), tmp_path / "out", alpha=8)
    same(tmp_path / "out", pairs, path / "llama")


def rotated(weight, heads):
    """llama.cpp's order of the rows of q and k: the halves of each head interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, pairs, architecture, config, *, kind="lora", quantised=False, extra=()):
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", 8.0)
    for module, pair in pairs.items():
        layer, leaf = module.split(".")[2], module.rpartition(".")[2]
        a, b = pair.a.numpy().astype(np.float32), pair.b.numpy().astype(np.float32)
        if architecture == "llama" and leaf in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if leaf == "q_proj" else "num_key_value_heads"]
            b = rotated(b, heads)
        name = f"blk.{layer}.{BLOCKS[leaf]}.weight"
        if quantised:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.lora_a", gguf.quants.quantize(a, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    for name in extra:
        writer.add_tensor(name, np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gguf(path, tmp_path, family):
    config = json.loads((path / family / "config.json").read_text())
    own = read_pairs(str(path / f"{family}-adapter")).pairs
    write_gguf(tmp_path / "lora.gguf", own, family, config)
    found = convert(str(tmp_path / "lora.gguf"), tmp_path / "out", model_path=str(path / family))
    assert (found.writer, found.modules) == ("llama.cpp", 14)
    same(tmp_path / "out", own, path / family)


def test_a_quantised_gguf(path, pairs, tmp_path):
    config = json.loads((path / "llama" / "config.json").read_text())
    wide = {m: p for m, p in pairs.items() if p.a.shape[1] % 32 == 0}
    write_gguf(tmp_path / "lora.gguf", wide, "llama", config, quantised=True)
    convert(str(tmp_path / "lora.gguf"), tmp_path / "out", model_path=str(path / "llama"))
    for name, pair in read_pairs(str(tmp_path / "out")).pairs.items():
        torch.testing.assert_close(pair.a, wide[name].a, rtol=0.02, atol=0.02)


def test_what_gguf_is_refused(path, pairs, tmp_path):
    config = json.loads((path / "llama" / "config.json").read_text())
    model = str(path / "llama")

    def refused(error, said, **options):
        file = tmp_path / "lora.gguf"
        write_gguf(file, pairs, options.pop("architecture", "llama"), config, **options)
        with pytest.raises(error, match=said):
            convert(str(file), tmp_path / "out", model_path=model)

    refused(AdapterInvalid, "no LoRA adapter", kind="control_vector")
    refused(AdapterUnsupported, "architecture bert", architecture="bert")
    refused(AdapterUnsupported, "only LoRA matrices", extra=["blk.0.attn_norm.weight"])
    refused(AdapterInvalid, "no such module", extra=["blk.0.strange.weight.lora_a", "blk.0.strange.weight.lora_b"])
    refused(AdapterUnsupported, "embedding", extra=["token_embd.weight.lora_a", "token_embd.weight.lora_b"])
    with pytest.raises(ConfigError, match="--model-path"):
        convert(str(tmp_path / "lora.gguf"), tmp_path / "out")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterInvalid, match="cannot be read as GGUF"):
        convert(str(tmp_path / "lora.gguf"), tmp_path / "out", model_path=model)
    assert not (tmp_path / "out").exists()


def test_the_order_of_heads():
    b = torch.arange(24.0).view(12, 2)
    assert torch.equal(in_order(torch.from_numpy(rotated(b.numpy(), 3)), 3), b)
    with pytest.raises(AdapterInvalid, match="another base model"):
        in_order(b, 5)


def test_nothing_there(path, tmp_path):
    with pytest.raises(AdapterNotFound, match="no such file"):
        convert(str(tmp_path / "nowhere"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNotFound, match="no weights"):
        convert(str(tmp_path / "empty"), tmp_path / "out")
    (tmp_path / "empty" / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(AdapterInvalid, match="safetensors"):
        convert(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(ConfigError, match="--out"):
        convert(str(path / "llama-adapter"), path / "llama")
