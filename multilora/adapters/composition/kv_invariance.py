"""Whether an adapter leaves every key and value as the base model computes it; then both may share cached prefixes.

K and V of layer l depend on everything that acts before them: on all of the layers below, and within layer l on the
modules that declare `before_kv` (for Llama the norm that feeds k_proj and v_proj, those two, and the norm of k). So
the adapters that leave them alone are those that act only behind the K and V of the last layer: on its queries, its
output projection, its MLP, the final norm and the head. This is exact, not approximate: the same operations on the
same numbers.
"""

from multilora.adapters.peft.base_model import BaseModel, Place
from multilora.lora.panels import AdapterShape
from multilora.lora.sites import MODEL_LEVEL


def leaves_kv(shape: AdapterShape, base: BaseModel) -> bool:
    """Whether an adapter of this shape changes no key and no value of the base model."""
    behind_all = (MODEL_LEVEL, base.num_layers - 1)
    return all(place.layer in behind_all and not base.before_kv[place] for place in _acts_on(shape, base))


def _acts_on(shape: AdapterShape, base: BaseModel) -> set[Place]:
    found = {Place(w.layer, w.module) for w in shape.full_weights}
    for table in (shape.ranks, shape.scale_shift):
        for site, values in zip(base.sites, table, strict=False):  # no scale-shift pairs: an empty table
            found |= {Place(site.layer, s.module) for s, value in zip(site.slices, values, strict=True) if value}
    return found
