"""Hermes and Qwen 2.5 / Qwen 3: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one pair of tags per call.

The closing tag may be missing, several objects may share a pair of tags, and a closing tag inside a JSON string is
text of that string.
"""

from multilora.front.tools.json_calls import JsonCalls


class HermesCalls(JsonCalls):
    opening = ("<tool_call>",)
    closing = "</tool_call>"
    lists = True
