"""The LoRA sites of a Llama-like decoder: four linear layers per decoder layer (seven PEFT target modules).

At the end those of the model itself: the token embedding, whose input counts as one-hot rows, and the head.
"""

from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice
from multilora.models.config import ModelConfig


def decoder_sites(config: ModelConfig) -> tuple[LoraSite, ...]:
    """Per layer qkv_proj, o_proj, gate_up_proj, down_proj, in this order; then embed_tokens and lm_head."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    linears: list[tuple[str, int, dict[str, int]]] = [
        ("qkv_proj", hidden, {"q_proj": q, "k_proj": kv, "v_proj": kv}),
        ("o_proj", q, {"o_proj": hidden}),
        ("gate_up_proj", hidden, {"gate_proj": inner, "up_proj": inner}),
        ("down_proj", inner, {"down_proj": hidden}),
    ]
    sites: list[LoraSite] = []
    for layer in range(config.num_layers):
        for name, in_features, widths in linears:
            sites.append(LoraSite(len(sites), layer, name, in_features, _slices(widths)))
    for name, in_features, out_features in (
        ("embed_tokens", config.vocab_size, hidden),
        ("lm_head", hidden, config.vocab_size),
    ):
        sites.append(LoraSite(len(sites), MODEL_LEVEL, name, in_features, _slices({name: out_features})))
    return tuple(sites)


def _slices(widths: dict[str, int]) -> tuple[LoraSlice, ...]:
    found: list[LoraSlice] = []
    offset = 0
    for module, width in widths.items():
        found.append(LoraSlice(module, offset, width))
        offset += width
    return tuple(found)
