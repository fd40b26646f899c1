"""What is better or worse than in an earlier result of the same benchmark.

    python -m bench.compare OLD.json NEW.json

Rows are told apart by their names; for which units less is better, `LESS_IS_BETTER` says.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common import LESS_IS_BETTER

LEAST = 0.02
"""A change below it is called the same: two runs on one machine differ by as much."""
SAID = ("commit", "date", "gpu", "cpu", "cores", "command")
"""What is said of both where it differs."""


def compare(old: dict[str, Any], new: dict[str, Any], least: float = LEAST) -> list[str]:
    """Lines to print: how the two were made, then each row of the new one, those that changed most first, then what
    only one of them has. Raises ValueError for a row whose unit has changed."""
    lines = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in SAID if old.get(name) != new.get(name)]
    before, after = ({row["row"]: row for row in result["rows"]} for result in (old, new))
    gains = {name: gain(before[name], after[name]) for name in after if name in before}
    verdicts = {name: verdict(factor, least) for name, factor in gains.items()}
    for name in sorted(gains, key=lambda name: -abs(gains[name] - 1)):
        values = f"{before[name]['value']:>10.4g} -> {after[name]['value']:>10.4g} {after[name]['unit']}"
        lines.append(f"{verdicts[name]:<7}{name:<58} {values}")
    for which, names in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        lines += [f"only in the {which} one: {name}" for name in sorted(names)]
    counts = Counter(verdicts.values())
    lines.append(f"{counts['better']} better, {counts['same']} the same, {counts['WORSE']} worse")
    return lines


def gain(old: dict[str, Any], new: dict[str, Any]) -> float:
    """By which factor the new row is better, if above 1, or worse. What is not above 0, as a difference of two times
    can be, is not compared: 1."""
    if old["unit"] != new["unit"]:
        raise ValueError(f"{new['row']}: {old['unit']} there, {new['unit']} here")
    was, now = old["value"], new["value"]
    if was <= 0 or now <= 0:
        return 1.0
    return float(was / now if new["unit"] in LESS_IS_BETTER else now / was)


def verdict(factor: float, least: float) -> str:
    """What such a factor is called."""
    if abs(factor - 1) < least:
        return "same"
    return "better" if factor > 1 else "WORSE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=LEAST, help="a change below it is called the same")
    args = parser.parse_args()
    results = (json.loads(path.read_text()) for path in (args.old, args.new))
    sys.stdout.write("\n".join(compare(*results, args.least)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
