"""Anthropic's system text and messages as chat messages.

A user's message is cut where tool results stand in it, since each of them is a chat message. Blocks of an assistant
are one message with its thoughts, text and calls. Knows nothing of bodies.
"""

from collections.abc import Mapping
from typing import Any

from multilora.server.dialects import a_list, a_string, an_object, refused, text_part

Message = dict[str, Any]


def chat_messages(system: str | list[Any] | None, messages: list[Any]) -> tuple[list[Message], bool]:
    """The messages, and whether the last one is the beginning of the answer. Raises BadRequest naming the field."""
    found: list[Message] = []
    if system:
        found.append({"role": "system", "content": _texts(system, "system")})
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        message = an_object(message, path)
        content, role = message.get("content"), message.get("role")
        blocks = [text_part(content)] if isinstance(content, str) else a_list(content, f"{path}.content")
        if role == "user":
            found += _user(blocks, f"{path}.content")
        elif role == "assistant":
            found.append(_assistant(blocks, f"{path}.content"))
        elif role == "system":
            found.append({"role": "system", "content": _texts(blocks, f"{path}.content")})
        else:
            raise refused(f"{path}.role", f"{role!r:.80} must be user, assistant or system")
    if not messages:
        raise refused("messages", "at least one message is required")
    return found, _is_prefill(found[-1], len(messages) - 1)


def _user(blocks: list[Any], path: str) -> list[Message]:
    found: list[Message] = []
    for i, given in enumerate(blocks):
        where = f"{path}[{i}]"
        block = an_object(given, where)
        if block.get("type") == "tool_result":
            content = _texts(block.get("content") or "", f"{where}.content")
            found.append({"role": "tool", "tool_call_id": a_string(block, "tool_use_id", where), "content": content})
            continue
        part = text_part(_text(block, where))
        if found and found[-1]["role"] == "user":
            found[-1]["content"].append(part)
        else:
            found.append({"role": "user", "content": [part]})
    if not found:
        raise refused(path, "at least one block is required")
    return found


def _assistant(blocks: list[Any], path: str) -> Message:
    texts: list[Any] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for i, given in enumerate(blocks):
        where = f"{path}[{i}]"
        block = an_object(given, where)
        match block.get("type"):
            case "tool_use":
                arguments = an_object(block.get("input"), f"{where}.input")
                function = {"name": a_string(block, "name", where), "arguments": arguments}
                calls.append({"id": a_string(block, "id", where), "type": "function", "function": function})
            case "thinking":
                thoughts.append(a_string(block, "thinking", where))
            case "redacted_thinking":
                pass  # thoughts of another service, which nobody here can read
            case _:
                texts.append(text_part(_text(block, where)))
    message: Message = {"role": "assistant", "content": texts}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _is_prefill(last: Message, index: int) -> bool:
    if last["role"] != "assistant":
        return False
    if "tool_calls" in last or not last["content"]:
        raise refused(f"messages[{index}]", "the last message can begin the answer only as text")
    return True


def _texts(content: Any, path: str) -> str | list[dict[str, Any]]:
    """Text, or blocks of text as parts."""
    if isinstance(content, str):
        return content
    blocks = a_list(content, path)
    return [text_part(_text(an_object(block, f"{path}[{i}]"), f"{path}[{i}]")) for i, block in enumerate(blocks)]


def _text(block: Mapping[str, Any], path: str) -> str:
    if block.get("type") != "text":
        raise refused(f"{path}.type", f"{block.get('type')!r:.80} is not served here")
    return a_string(block, "text", path)
