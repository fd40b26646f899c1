"""Which fields the request bodies of SGLang and vLLM have, with their defaults: makes `tests/data/peer_fields.json`.

    pip download --no-deps sglang==0.5.23 vllm==0.33.0 -d DIR
    python -m scripts.peer_fields DIR > tests/data/peer_fields.json

Reads the peers' classes from their wheels by `ast`, so that nothing of a peer is imported or installed. A field is
written as `{"line": …}` with one of: `"default"`, its default as JSON; `"required": true`; or `"computed": true`, for
a default that is made at run time or is no JSON value. `"class"` and `"file"` stand at a field only where it is
inherited. Fields whose names begin with an underscore are no part of a body and are left out.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SGLANG_IO = "sglang/srt/managers/io_struct.py"
SGLANG_OPENAI = "sglang/srt/entrypoints/openai/protocol.py"
SGLANG_ANTHROPIC = "sglang/srt/entrypoints/anthropic/protocol.py"
SGLANG_SAMPLING = "sglang/srt/sampling/sampling_params.py"
VLLM = "vllm/entrypoints"
VLLM_POOLING = f"{VLLM}/pooling"

# (file, route or the object within bodies, class)
BODIES = [
    (SGLANG_IO, "/generate", "GenerateReqInput"),
    (SGLANG_SAMPLING, "sampling_params", "SamplingParams"),
    (SGLANG_OPENAI, "/v1/completions", "CompletionRequest"),
    (SGLANG_OPENAI, "/v1/chat/completions", "ChatCompletionRequest"),
    (SGLANG_OPENAI, "/v1/responses", "ResponsesRequest"),
    (SGLANG_OPENAI, "/tokenize", "TokenizeRequest"),
    (SGLANG_OPENAI, "/detokenize", "DetokenizeRequest"),
    (SGLANG_OPENAI, "/v1/embeddings", "EmbeddingRequest"),
    (SGLANG_OPENAI, "/v1/score", "ScoringRequest"),
    (SGLANG_OPENAI, "/v1/rerank", "V1RerankReqInput"),
    (SGLANG_OPENAI, "stream_options", "StreamOptions"),
    (SGLANG_OPENAI, "response_format", "ResponseFormat"),
    (SGLANG_OPENAI, "response_format.json_schema", "JsonSchemaResponseFormat"),
    (SGLANG_ANTHROPIC, "/v1/messages", "AnthropicMessagesRequest"),
    (SGLANG_ANTHROPIC, "/v1/messages/count_tokens", "AnthropicCountTokensRequest"),
    (SGLANG_IO, "/load_lora_adapter", "LoadLoRAAdapterReqInput"),
    (SGLANG_IO, "/load_lora_adapter_from_tensors", "LoadLoRAAdapterFromTensorsReqInput"),
    (SGLANG_IO, "/unload_lora_adapter", "UnloadLoRAAdapterReqInput"),
    (SGLANG_IO, "/abort_request", "AbortReq"),
    (SGLANG_IO, "/pause_generation", "PauseGenerationReqInput"),
    (SGLANG_IO, "/continue_generation", "ContinueGenerationReqInput"),
    (SGLANG_IO, "/release_memory_occupation", "ReleaseMemoryOccupationReqInput"),
    (SGLANG_IO, "/resume_memory_occupation", "ResumeMemoryOccupationReqInput"),
    (SGLANG_IO, "/update_weight_version", "UpdateWeightVersionReqInput"),
    (SGLANG_IO, "/start_profile", "ProfileReq"),
    (f"{VLLM}/openai/completion/protocol.py", "/v1/completions", "CompletionRequest"),
    (f"{VLLM}/openai/chat_completion/protocol.py", "/v1/chat/completions", "ChatCompletionRequest"),
    (f"{VLLM}/openai/responses/protocol.py", "/v1/responses", "ResponsesRequest"),
    (f"{VLLM}/scale_out/token_in_token_out/protocol.py", "/inference/v1/generate", "GenerateRequest"),
    ("vllm/sampling_params.py", "sampling_params", "SamplingParams"),
    ("vllm/sampling_params.py", "structured_outputs", "StructuredOutputsParams"),
    (f"{VLLM}/generate/base/protocol.py", "stream_options", "StreamOptions"),
    (f"{VLLM}/generate/base/protocol.py", "response_format", "ResponseFormat"),
    (f"{VLLM}/generate/base/protocol.py", "response_format.json_schema", "JsonSchemaResponseFormat"),
    (f"{VLLM}/serve/tokenize/protocol.py", "/tokenize", "TokenizeCompletionRequest"),
    (f"{VLLM}/serve/tokenize/protocol.py", "/tokenize", "TokenizeChatRequest"),
    (f"{VLLM}/serve/tokenize/protocol.py", "/detokenize", "DetokenizeRequest"),
    (f"{VLLM}/anthropic/protocol.py", "/v1/messages", "AnthropicMessagesRequest"),
    (f"{VLLM}/anthropic/protocol.py", "/v1/messages/count_tokens", "AnthropicCountTokensRequest"),
    (f"{VLLM}/serve/lora/protocol.py", "/v1/load_lora_adapter", "LoadLoRAAdapterRequest"),
    (f"{VLLM}/serve/lora/protocol.py", "/v1/unload_lora_adapter", "UnloadLoRAAdapterRequest"),
    (f"{VLLM_POOLING}/embed/protocol.py", "/v1/embeddings", "EmbeddingCompletionRequest"),
    (f"{VLLM_POOLING}/embed/protocol.py", "/v1/embeddings", "EmbeddingChatRequest"),
    (f"{VLLM_POOLING}/scoring/protocol.py", "/v1/score", "ScoreQueriesDocumentsRequest"),
    (f"{VLLM_POOLING}/scoring/protocol.py", "/v1/rerank", "RerankRequest"),
    (f"{VLLM_POOLING}/classify/protocol.py", "/classify", "ClassificationCompletionRequest"),
]

EMPTY_FACTORIES: dict[str, Any] = {"list": [], "dict": {}, "set": [], "str": ""}
FIELD_CALLS = {"Field", "field", "dataclasses.field", "msgspec.field"}
PRIVATE_CALLS = {"PrivateAttr"}


class NotJsonError(Exception):
    """The default is made at run time, or is no JSON value."""


@dataclass
class Module:
    """One source file of a peer: its classes, constants and where its imported names come from."""

    path: str
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # name → (dotted module, name there)

    @classmethod
    def parse(cls, path: str, source: str) -> "Module":
        module = cls(path)
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                module.classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                module.constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                module.constants[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom):
                parents = path.split("/")[: -node.level] if node.level else []
                dotted = ".".join([*parents, *([node.module] if node.module else [])])
                for alias in node.names:
                    module.imports[alias.asname or alias.name] = (dotted, alias.name)
        return module


class Peers:
    """The wheels of one folder, their modules parsed when first asked for."""

    def __init__(self, folder: Path):
        self.versions: dict[str, str] = {}
        self._wheels: dict[str, zipfile.ZipFile] = {}
        self._modules: dict[str, Module] = {}
        for wheel in sorted(folder.glob("*.whl")):
            name, version = wheel.name.split("-")[:2]
            self.versions[name] = version
            self._wheels[name] = zipfile.ZipFile(wheel)

    def module(self, path: str) -> Module:
        if path not in self._modules:
            source = self._wheels[path.partition("/")[0]].read(path).decode()
            self._modules[path] = Module.parse(path, source)
        return self._modules[path]

    def imported(self, module: Module, name: str) -> tuple[Module, str] | None:
        """Where a name that a module imports is defined; None for what lies outside the wheels."""
        dotted, original = module.imports.get(name, ("", ""))
        wheel = self._wheels.get(dotted.partition(".")[0])
        base = dotted.replace(".", "/")
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if wheel is not None and path in wheel.NameToInfo:
                return self.module(path), original
        return None

    def find_class(self, module: Module, name: str) -> tuple[Module, ast.ClassDef] | None:
        if name in module.classes:
            return module, module.classes[name]
        found = self.imported(module, name)
        return self.find_class(*found) if found else None

    def fields(self, module: Module, node: ast.ClassDef) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, facts) of every field, those of base classes first; a subclass's own come again and win."""
        for base in node.bases:
            found = self.find_class(module, _plain_name(base))
            if found is not None:
                for name, facts in self.fields(*found):
                    yield name, {"class": found[1].name, "file": found[0].path} | facts
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                own = self._body_name(item)
                if own is not None:
                    yield own, {"line": item.lineno} | self._default(module, item)

    @staticmethod
    def _body_name(item: ast.AnnAssign) -> str | None:
        """The name that a field has in a body (its alias, if it has one); None: it is no part of one."""
        assert isinstance(item.target, ast.Name)
        value, name = item.value, item.target.id
        if "ClassVar" in ast.unparse(item.annotation):
            return None
        if isinstance(value, ast.Call):
            if ast.unparse(value.func) in PRIVATE_CALLS:
                return None
            options = {keyword.arg: keyword.value for keyword in value.keywords}
            if isinstance(init := options.get("init"), ast.Constant) and init.value is False:
                return None
            if isinstance(alias := options.get("alias"), ast.Constant):
                name = str(alias.value)
        return None if name.startswith("_") else name

    def _default(self, module: Module, item: ast.AnnAssign) -> dict[str, Any]:
        value = item.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) in FIELD_CALLS:
            options = {keyword.arg: keyword.value for keyword in value.keywords}
            if "default_factory" in options:
                factory = ast.unparse(options["default_factory"])
                if factory not in EMPTY_FACTORIES:
                    return {"computed": True}
                return {"default": EMPTY_FACTORIES[factory]}
            value = value.args[0] if value.args else options.get("default")
        if value is None or (isinstance(value, ast.Constant) and value.value is ...):
            return {"required": True}
        try:
            return {"default": self._evaluate(module, value)}
        except NotJsonError:
            return {"computed": True}

    def _evaluate(self, module: Module, node: ast.expr) -> Any:
        """The JSON value of a literal, or of a constant defined in the wheels. Raises NotJsonError."""
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._evaluate(module, item) for item in items]
            case ast.Dict(keys=[], values=[]):
                return {}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._evaluate(module, operand)
            case ast.BinOp(left=left, op=ast.LShift(), right=right):
                return self._evaluate(module, left) << self._evaluate(module, right)
            case ast.Name(id=name) if name in module.constants:
                return self._evaluate(module, module.constants[name])
            case ast.Name(id=name) if found := self.imported(module, name):
                return self._evaluate(found[0], ast.Name(found[1]))
        raise NotJsonError(ast.unparse(node))


def _plain_name(base: ast.expr) -> str:
    """`Generic[T]` → `Generic`, `a.B` → `B`."""
    return ast.unparse(base).partition("[")[0].rpartition(".")[2]


def read_bodies(folder: Path) -> dict[str, Any]:
    """Everything `tests/data/peer_fields.json` holds."""
    peers = Peers(folder)
    bodies = []
    for path, route, name in BODIES:
        module = peers.module(path)
        fields = dict(sorted(dict(peers.fields(module, module.classes[name])).items()))
        if not fields:
            raise SystemExit(f"{path}: {name} has no fields; was it moved?")
        peer = path.partition("/")[0]
        bodies.append({"peer": peer, "route": route, "class": name, "file": path, "fields": fields})
    return {"peers": peers.versions, "bodies": bodies}


def main() -> None:
    data = read_bodies(Path(sys.argv[1]))
    text = json.dumps(data, indent=1, ensure_ascii=False)
    # one line for each field: a change of a peer's version is then a readable difference
    facts = r"\{\n\s+((?:\"(?:class|file|line|default|required|computed)\": [^\n{}]*\n?\s*)+)\}"
    text = re.sub(facts, _one_line, text)
    sys.stdout.write(text + "\n")


def _one_line(match: "re.Match[str]") -> str:
    return "{" + " ".join(match[1].split()) + "}"


if __name__ == "__main__":
    main()
