"""Answers of all replicas to one request as one answer: sums for those who watch, agreement for those who change."""

import json
import re
from typing import Any

Whole = tuple[str, int, list[Any], bytes]
"""Replica, status, headers, body."""
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]

_SAMPLE = re.compile(rb"^([A-Za-z_:][\w:]*)(\{)?")


def merge(path: str, answers: list[Whole]) -> Answer:
    """The worst answer to a change, as one that a replica has refused was not made everywhere. To those who watch, an
    error stands for all, too."""
    if not answers:
        body = b'{"error": {"message": "no replica is ready", "type": "service_unavailable_error"}}'
        return 503, [(b"content-type", b"application/json")], body
    worst = max(answers, key=lambda answer: answer[1])
    if worst[1] >= 400 or path not in _MERGERS:
        return worst[1], _headers(worst), worst[3]
    return worst[1], _headers(worst), _MERGERS[path](answers)


def _headers(answer: Whole) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in answer[2] if name.lower() != b"content-length"]


def _metrics(answers: list[Whole]) -> bytes:
    """Every sample with the label `replica`; what a metric is, is said once."""
    families: dict[bytes, list[bytes]] = {}
    about: dict[bytes, list[bytes]] = {}
    for replica, _, _, body in answers:
        label, family = f'replica="{replica}"'.encode(), b""
        for line in body.splitlines():
            if line.startswith(b"#"):
                family = line.split(b" ", 3)[2] if line.count(b" ") >= 2 else family
                lines = about.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif line:
                families.setdefault(family, []).append(_labelled(line, label))
    parts = [line for family in about for line in (*about[family], *families.pop(family, []))]
    parts += [line for lines in families.values() for line in lines]
    return b"\n".join(parts) + b"\n"


def _labelled(line: bytes, label: bytes) -> bytes:
    match = _SAMPLE.match(line)
    if match is None:
        return line
    return match[1] + (b"{" + label + b"," if match[2] else b"{" + label + b"}") + line[match.end() :]


def _loads(answers: list[Whole]) -> bytes:
    """SGLang's list of loads, one entry for each replica, numbered as data-parallel ranks are."""
    contents = [json.loads(body) for *_, body in answers]
    merged = contents[0]
    if isinstance(merged, dict) and isinstance(merged.get("loads"), list):
        loads = [load for content in contents for load in content["loads"]]
        merged["loads"] = [load | {"dp_rank": i} for i, load in enumerate(loads)]
        if "dp_rank_count" in merged:
            merged["dp_rank_count"] = len(loads)
    return json.dumps(merged).encode()


_MERGERS = {"/metrics": _metrics, "/v1/loads": _loads}
