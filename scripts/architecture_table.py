"""Serves a tiny model of every architecture that transformers knows, and writes down how it is served.

    python scripts/architecture_table.py            walk all of them (half an hour on two cores)
    python scripts/architecture_table.py NAME …     these only; the others keep what is written
    python scripts/architecture_table.py --table    the table of docs/models.md from the data file, without a walk

The data file is tests/data/architectures.json, with the version of transformers whose mapping it is. Run it after
transformers was updated or the backend changed; tests hold the data file against that version's mapping and the table
against the data file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "architectures.json"
DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- architectures: written by scripts/architecture_table.py -->", "<!-- end of the architectures -->"
HEAD = ["| architecture | model_type | served | ranks share |", "|---|---|---|---|"]
WAYS = {"native": "natively", "transformers": "through transformers"}

Data = dict[str, dict[str, str]]


def table(data: Data) -> list[str]:
    """Lines of the table, those that are served first."""
    order = sorted(data, key=lambda name: ([*WAYS, "refused"].index(data[name]["way"]), name.lower()))
    return [
        *HEAD,
        *(
            f"| {name} | {data[name]['model_type']} | {outcome(data[name])} | {data[name]['ranks']} |"
            for name in order
        ),
    ]


def outcome(entry: dict[str, str]) -> str:
    return WAYS.get(entry["way"]) or f"refused: {entry['reason']}"


def written(text: str) -> list[str]:
    """The table's lines in the text of docs/models.md."""
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def write_table(data: Data) -> None:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, *table(data), END]) + rest.partition(END)[2])


def walk(name: str, model_type: str) -> dict[str, str]:
    """Each in a process of its own, so that none leaves anything to the next. Raises CalledProcessError."""
    code = (
        "import json, sys, pathlib, walk\n"
        "v = walk.examine(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))\n"
        "print(json.dumps({'way': v.way, 'reason': v.reason, 'ranks': v.ranks}))"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", code, name, model_type, folder]
        done = subprocess.run(command, check=True, cwd=ROOT / "tests" / "support", capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return {"model_type": model_type} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--table", action="store_true", help="write the table only")
    arguments = parser.parse_args()
    recorded = json.loads(DATA.read_text()) if DATA.exists() else {"transformers": "", "architectures": {}}
    data: Data = recorded["architectures"]
    if not arguments.table:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import transformers
        from architectures import architectures

        of_all = recorded["transformers"] if arguments.names else transformers.__version__
        for name, model_type in architectures():
            if not arguments.names or name in arguments.names:
                data[name] = walk(name, model_type)
                print(name, outcome(data[name]), flush=True)
        recorded = {"transformers": of_all, "architectures": dict(sorted(data.items()))}
        DATA.write_text(json.dumps(recorded, indent=1) + "\n")
    write_table(data)


if __name__ == "__main__":
    main()
