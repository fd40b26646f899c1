"""`make sbom`: what a wheel brings along, as a CycloneDX bill of materials and as a table of licences.

The wheel is installed into an environment of its own, with nothing else; the bill is of that environment. Exit code 1
if a package names no licence.

    python scripts/sbom.py dist/multilora-0.1.0-py3-none-any.whl dist/sbom.cdx.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(wheel: str, out: str) -> int:
    """Write the bill and print the table."""
    with tempfile.TemporaryDirectory(prefix="multilora-sbom-") as directory:
        python = _environment(Path(directory), wheel)
        command = [sys.executable, "-m", "cyclonedx_py", "environment", str(python)]
        subprocess.run([*command, "--output-reproducible", "--of", "JSON", "--output-file", out], check=True)
        bill = json.loads(Path(out).read_text())
        name_licences(bill, _own_words(python))
    Path(out).write_text(json.dumps(bill, indent=2) + "\n")
    rows = licences(bill)
    sys.stdout.writelines(f"{name:<28} {version:<16} {licence}\n" for name, version, licence in rows)
    unnamed = [name for name, _, licence in rows if not licence]
    if unnamed:
        sys.stderr.write(f"no licence is named by {', '.join(unnamed)}\n")
    return 1 if unnamed else 0


def _environment(directory: Path, wheel: str) -> Path:
    """A new environment with the wheel in it; torch comes first and from TORCH_INDEX, if that is set."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "-c", "constraints.txt"]
    index = os.environ.get("TORCH_INDEX")
    subprocess.run([*pip, *(["--index-url", index] if index else []), "torch"], check=True)
    subprocess.run([*pip, wheel], check=True)
    return python


def _own_words(python: Path) -> dict[str, str]:
    """Package → what it calls its licence in words of its own, which no list of licences has."""
    ask = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({d.name: d.metadata['License'] or '' for d in distributions()}))"
    )
    done = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def name_licences(bill: dict[str, Any], own_words: dict[str, str]) -> None:
    """Add those of packages that have none in the bill."""
    for part in bill["components"]:
        words = own_words.get(part["name"], "").strip()
        if not part.get("licenses") and words:
            part["licenses"] = [{"license": {"name": words.splitlines()[0][:60]}}]


def licences(bill: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, version, licences) of each package, by name. An empty licence: the package names none."""
    found = []
    for part in bill["components"]:
        named = []
        for choice in part.get("licenses", ()):
            licence = choice.get("license", {})
            named.append(choice.get("expression") or licence.get("id") or licence.get("name") or "")
        short = sorted({name.splitlines()[0][:60] for name in named if name})
        found.append((part["name"], part.get("version", ""), ", ".join(short)))
    return sorted(found, key=lambda row: row[0].lower())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
