"""What clients write to have answers follow a grammar, in the words of OpenAI, SGLang and vLLM.

`response_format`, `structured_outputs`, vLLM's older `guided_*` and SGLang's own fields all become one grammar field
of `SamplingParams`. Knows no compiler: a grammar that cannot be compiled is refused later.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from multilora.errors import BadRequest
from multilora.params import GRAMMAR_FIELDS, GrammarField
from multilora.server.bodies import Body, Texts

Constraint = tuple[str, GrammarField, str]  # the client's field, the parameter that it becomes, the grammar's source

ANY_OBJECT = '{"type": "object"}'


class JsonSchema(Body):
    where = "response_format.json_schema"
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's; of type "structural_tag" in xgrammar's form (`format`) or in SGLang's older one."""

    where = "response_format"
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    at_least_one: bool | None = None

    def constraint(self) -> Constraint | None:
        """None: any text will do. Raises BadRequest."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return "response_format", "json_schema", ANY_OBJECT
            case "json_schema":
                if self.json_schema is None:
                    raise BadRequest("response_format.json_schema: this field is required", param="response_format")
                return "response_format", "json_schema", json.dumps(self.json_schema.schema_)
            case "structural_tag":
                if (self.format is None) == (self.structures is None):
                    message = "response_format: exactly one of format and structures must be given"
                    raise BadRequest(message, param="response_format")
                own = ("type", "format", "structures", "triggers", "at_least_one")
                tag = {name: value for name in own if (value := getattr(self, name)) is not None}
                return "response_format", "structural_tag", json.dumps(tag)


class StructuredOutputs(Body):
    """vLLM's."""

    where = "structured_outputs"
    grammars: ClassVar[Mapping[str, GrammarField]] = {
        "json_": "json_schema",
        "regex": "regex",
        "choice": "ebnf",
        "grammar": "ebnf",
        "json_object": "json_schema",
        "structural_tag": "structural_tag",
    }
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None

    def constraint(self) -> Constraint:
        """Raises BadRequest unless exactly one is given."""
        given = _constraints(self, self.grammars, "structured_outputs.")
        if not given:
            names = ", ".join(name.rstrip("_") for name in self.grammars)
            raise BadRequest(f"structured_outputs: one of {names} must be given", param="structured_outputs")
        return sole(given, "structured_outputs")


class GuidedFields(Body):
    """The fields of bodies whose answer may follow a grammar. The `guided_*` ones are older vLLM's."""

    grammars: ClassVar[Mapping[str, GrammarField]] = {
        "guided_json": "json_schema",
        "guided_regex": "regex",
        "guided_choice": "ebnf",
        "guided_grammar": "ebnf",
        "json_schema": "json_schema",
        "regex": "regex",
        "ebnf": "ebnf",
    }
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None

    def constraint(self) -> Constraint | None:
        """The one grammar that the body asks for; None: it asks for none. Raises BadRequest naming two."""
        given: list[Constraint] = []
        if self.response_format is not None and (found := self.response_format.constraint()) is not None:
            given.append(found)
        if self.structured_outputs is not None:
            given.append(self.structured_outputs.constraint())
        given += _constraints(self, self.grammars)
        return sole(given) if given else None


@contextlib.contextmanager
def in_the_clients_field(given: Constraint | None) -> Iterator[None]:
    """What a BadRequest of the block says of a grammar it says of the field that the client has sent: of `given` or,
    where the grammar is that of a forced call, of the tools."""
    try:
        yield
    except BadRequest as e:
        if e.param not in GRAMMAR_FIELDS:
            raise
        field = "tools" if given is None else given[0]
        message = e.message.replace(f"sampling_params.{e.param}", field, 1)
        raise type(e)(message, param=field.partition(".")[0]) from None


def sole(given: list[Constraint], param: str | None = None) -> Constraint:
    """The one that is given. Raises BadRequest naming two that are, about the field `param` or the second of them."""
    if len(given) > 1:
        first, second = given[0][0], given[1][0]
        message = f"an answer can follow only one grammar, but {first} and {second} are both given"
        raise BadRequest(message, param=param or second)
    return given[0]


def choice_grammar(choices: list[str], param: str) -> str:
    """The EBNF grammar of answers that are one of `choices`. Raises BadRequest."""
    if not choices or any(not choice for choice in choices):
        raise BadRequest(f"{param}: must be a list of texts that are not empty", param=param.partition(".")[0])
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _constraints(body: Body, fields: Mapping[str, GrammarField], prefix: str = "") -> list[Constraint]:
    """Those of `fields` that hold a grammar, by their names with `prefix`; "" and false ask for none."""
    given = []
    for name, parameter in fields.items():
        value, shown = getattr(body, name), prefix + name.rstrip("_")
        if value is not None and value is not False and value != "":
            given.append((shown, parameter, _source(value, shown)))
    return given


def _source(value: Any, param: str) -> str:
    if value is True:
        return ANY_OBJECT
    if isinstance(value, list):
        return choice_grammar(value, param)
    return value if isinstance(value, str) else json.dumps(value)
