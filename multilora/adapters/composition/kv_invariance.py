"""Whether an adapter leaves every key and value as the base model computes it; then both may share cached prefixes.

K and V of layer l depend on whatever acts before them: on all of the layers below, and within layer l on the norm
that feeds k_proj and v_proj, on those two, and on the norm of k. So only what acts behind the last layer's K and V
leaves them alone: its queries, its output projection, its MLP, the final norm and the head. Exact, not approximate:
the same operations on the same numbers.
"""

from multilora.lora.panels import AdapterShape
from multilora.lora.sites import MODEL_LEVEL, LoraSite, num_layers

BEHIND_KV = frozenset(("q_proj", "q_norm", "o_proj", "post_attention_layernorm", "gate_proj", "up_proj", "down_proj"))
BEHIND_ALL = frozenset(("norm", "lm_head"))


def leaves_kv(shape: AdapterShape, sites: tuple[LoraSite, ...]) -> bool:
    last = num_layers(sites) - 1
    return all(
        module in BEHIND_ALL if layer == MODEL_LEVEL else layer == last and module in BEHIND_KV
        for layer, module in _acts_on(shape, sites)
    )


def _acts_on(shape: AdapterShape, sites: tuple[LoraSite, ...]) -> set[tuple[int, str]]:
    found = {(w.layer, w.module) for w in shape.full_weights}
    for table in (shape.ranks, shape.scale_shift):
        for site, values in zip(sites, table, strict=False):  # no scale-shift pairs: an empty table
            found |= {(site.layer, part.module) for part, value in zip(site.slices, values, strict=True) if value}
    return found
