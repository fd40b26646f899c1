"""Draws the life of an adapter version, from its transition table, into docs/memory.md.

    python scripts/lifecycle_diagram.py

Run it after `TRANSITIONS` in multilora/adapters/lifecycle/version.py has changed; a test fails until then.
"""

from pathlib import Path

from multilora.adapters.lifecycle.version import TRANSITIONS, State

DOCS = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- lifecycle: drawn by scripts/lifecycle_diagram.py -->", "<!-- end of the lifecycle -->"


def diagram() -> list[str]:
    """Lines of a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.REGISTERED.name}: load"]
    for (before, after), why in TRANSITIONS.items():
        target = "[*]" if after is State.GONE else after.name
        lines.append(f"    {before.name} --> {target}: {why}")
    return [*lines, "```"]


def written(text: str) -> list[str]:
    """The diagram's lines in the text of docs/memory.md."""
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def main() -> None:
    before, _, rest = DOCS.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text("\n".join([before + BEGIN, *diagram(), END]) + after)


if __name__ == "__main__":
    main()
