"""The results of `adapters merge`, `compose`, `convert`, `diff` and `bench` as text.

Called by `cli/adapter_work_commands.py`.
"""

import math

from multilora.adapter_tools.bench import AdapterCost
from multilora.adapter_tools.compose import Composition
from multilora.adapter_tools.convert.convert import Conversion
from multilora.adapter_tools.diff import AdapterDiff, ModuleDiff
from multilora.adapter_tools.merge import MergedModel
from multilora.adapter_tools.render import printable, size, table

HEAD = ("", "change", "cosine", "old size", "new size", "rank")
COSTS = ("batch", "base, ms", "adapter, ms", "over base")


def merged(found: MergedModel) -> str:
    """The text of `adapters merge`."""
    return printable(f"{found.path}: {found.changed} of {found.tensors} tensors changed, {size(found.nbytes)}")


def composed(found: Composition) -> str:
    """The text of `adapters compose`."""
    how = "exactly the weighted sum" if found.exact else "an approximation of the weighted sum"
    return printable(f"{found.path}: {found.method}, {found.modules} modules of rank {found.rank}, {how}")


def converted(found: Conversion) -> str:
    """The text of `adapters convert`."""
    lines = [f"{found.path}: from {found.writer}: {found.modules} modules, {found.tensors} tensors", *found.notes]
    return "\n".join(map(printable, lines))


def difference(found: AdapterDiff) -> str:
    """The text of `adapters diff`."""
    lines = [f"{name}: {_value(old)} → {_value(new)}" for name, (old, new) in found.config.items()]
    changed = [module for module in found.modules if module.change != 0]
    if changed:
        lines += [*([""] if lines else []), *table([HEAD, *map(_row, changed)]), ""]
    same = len(found.modules) - len(changed)
    lines.append(
        "the same"
        if found.same
        else f"{found.change:.2%} of the whole changed; {same} of {len(found.modules)} are equal"
    )
    return "\n".join(map(printable, lines))


def cost(found: AdapterCost) -> str:
    """The text of `adapters bench`."""
    lines = [
        f"{found.path} over {found.model_path}, {found.device}, {found.dtype}",
        f"  rank {found.rank}, {size(found.nbytes)} in host memory and on the device, loaded in "
        f"{found.load_seconds * 1e3:.3g} ms; its first request takes {found.first_ms:.3g} ms more than a later one",
    ]
    for title, rows in (
        (f"prompts of {found.prompt} tokens, all of a batch", found.prefill),
        ("one decode step", found.decode),
    ):
        cells = [(str(r.batch), f"{r.base_ms:.3g}", f"{r.adapter_ms:.3g}", f"{r.over_percent:+.1f} %") for r in rows]
        lines += ["", f"  {title}", *table([COSTS, *cells])]
    return "\n".join(map(printable, lines))


def _row(module: ModuleDiff) -> tuple[str, ...]:
    ranks = module.ranks
    rank = "" if ranks == (None, None) else str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} → {ranks[1]}"
    if module.change is None:
        change = "new" if module.old_norm is None else "gone" if module.new_norm is None else "another shape"
    else:
        change = "from nothing" if math.isinf(module.change) else f"{module.change:.3%}"
    return (module.name, change, _number(module.cosine), _number(module.old_norm), _number(module.new_norm), rank)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
