"""The results of `multilora adapters` as text. It owns columns and words, and knows neither files nor models.

Called by `cli/adapter_commands.py`; `render_work.py` shares tables and sizes.
"""

from collections.abc import Iterable, Sequence

from multilora.adapter_tools.inspect import Inspection
from multilora.adapter_tools.verify import Verdict

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
COLUMNS = ("", "modules", "layers", "rank", "scaling", "parameters")


def inspection(report: Inspection) -> str:
    """The text of `adapters inspect`."""
    facts = [
        ("method", report.method),
        ("base model", report.base_model_name_or_path),
        ("saved by", report.peft_version and f"PEFT {report.peft_version}"),
        ("on disk", _on_disk(report)),
    ]
    if report.served:
        s = report.served
        facts += [
            ("model", f"{s.model_path}, {s.dtype}, pages of {size(s.page_bytes)}"),
            ("when served", f"{_count(s.pages, 'page')}, {size(s.nbytes)}"),
        ]
    lines = [report.path, *_facts(facts)]
    if report.modules:
        rows = [
            (r.kind, " ".join(r.modules), r.layers, _number(r.rank), _number(r.scaling), f"{r.parameters:,}")
            for r in report.modules
        ]
        lines += ["", *table([COLUMNS, *rows])]
    lines += ["", _verdict(report)]
    return "\n".join(printable(line) for line in lines)


def verification(verdict: Verdict) -> str:
    """The text of `adapters verify`."""
    head = ("prompt", "tokens", "adapter", "equal", "difference")
    rows = [
        (c.prompt, str(c.length), "yes" if c.adapter else "base", f"{c.equal} of {c.tokens}", f"{c.difference:.2e}")
        for c in verdict.checks
    ]
    word = "the same as" if verdict.ok else "NOT the same as"
    lines = [
        *table([head, *rows]),
        "",
        f"largest difference of a logprob: {verdict.difference:.2e}, {verdict.dtype}, allowed {verdict.tolerance:g}",
        f"{verdict.path}: {word} PEFT {verdict.peft_version}",
    ]
    if verdict.ok is False and not verdict.base_ok:
        lines.append("the base model alone differs too, so the adapter need not be the cause")
    return "\n".join(printable(line) for line in lines)


def refusal(path: str, error: dict[str, str]) -> str:
    """The text of `adapters verify` for an adapter that cannot be loaded."""
    return printable(f"{path}: not served: {error['kind']}: {error['message']}")


def _verdict(report: Inspection) -> str:
    if report.error:
        return f"not served: {report.error['kind']}: {report.error['message']}"
    if report.compatible:
        return "compatible: yes"
    return "compatible: give --model-path to find out"


def _on_disk(report: Inspection) -> str | None:
    if report.bytes_on_disk is None:
        return None
    kinds = ", ".join(report.dtypes)
    return (
        f"{size(report.bytes_on_disk)}, {_count(report.tensors, 'tensor')} of {report.parameters:,} numbers, {kinds}"
    )


def _facts(facts: Iterable[tuple[str, str | None]]) -> list[str]:
    return [f"  {name:<12} {value}" for name, value in facts if value]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns that stand below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def size(count: int) -> str:
    """1536 → "1.5 KiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit + 1 < len(UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {UNITS[unit]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def printable(line: str) -> str:
    """The line without control characters: names come from untrusted files, and would reach the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
