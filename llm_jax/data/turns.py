"""Turns as other tools write them, as text: parts of a content, calls of tools, what tools there are.

A call is written as a model makes it in a chat: <T_C>{"name": …, "arguments": {…}}</T_C>, inference/tools.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.data.templates import CLOSE, OPEN, Message

_KINDS = {str: "text", list: "list", dict: "object"}


class UnusableError(ValueError):
    """Why a record is no conversation. detail: what of it differs from record to record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def field(record: Any, name: str, kind: type = str) -> Any:
    """A field of a record; raises UnusableError where it is missing or of another kind."""
    if not isinstance(record, Mapping) or name not in record:
        raise UnusableError(f"no field {name!r}")
    if not isinstance(record[name], kind):
        raise UnusableError(f"a field {name!r} that is no {_KINDS[kind]}")
    return record[name]


def turn(message: Any) -> Message:
    """A message whose content is text, a call of a tool behind it; one of weight 0 isn't trained on."""
    if not isinstance(message, Mapping):
        raise UnusableError("a turn that is no object")
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "function_call")}
    calls = message.get("tool_calls") or [*filter(None, [message.get("function_call")])]
    if len(calls) > 1:
        raise UnusableError("several calls of tools in one turn")
    if kept.get("weight") not in (None, 0, 1):
        raise UnusableError("a weight other than 0 and 1")
    said = kept.get("content")
    if isinstance(said, list):
        if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in said):
            raise UnusableError("a part of a turn that is no text")
        said = "\n".join(field(part, "text") for part in said)
    if calls:
        said = "\n".join([*filter(None, [said]), _call(calls[0])])
    role = "tool" if kept.get("role") == "function" else kept.get("role")
    return kept | {"role": role, "content": said}


def called(name: str, arguments: Mapping[str, Any]) -> str:
    """The call of a tool."""
    return f"{OPEN}{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}{CLOSE}"


def _call(call: Any) -> str:
    """Of OpenAI's {"function": {"name", "arguments"}} or what is in it; either, or both, as JSON's text."""
    try:
        call = json.loads(call) if isinstance(call, str) else call
        call = call.get("function") or call
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(call["name"], str) and isinstance(arguments, Mapping):
            return called(call["name"], arguments)
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    raise UnusableError("a call that has no name and arguments")


def tools(value: Any) -> list[dict[str, Any]]:
    """Tools by name, description and parameters, from a list of them, OpenAI's or bare, or its JSON."""
    try:
        value = json.loads(value) if isinstance(value, str) and value else value
        bare = [tool.get("function") or tool for tool in value or ()]
        told = ("name", "description", "parameters")
        return [{"name": tool["name"]} | {key: tool[key] for key in told if tool.get(key)} for tool in bare]
    except (ValueError, LookupError, AttributeError, TypeError):
        raise UnusableError("tools that are no list of names, descriptions and parameters") from None


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told about its tools."""
    form = f'{OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}'
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return "\n".join([f"You can call a tool by writing {form} and are then told its result. Tools:", *lines])


def introduced(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation at whose beginning a model is told about its tools, behind its system message."""
    if not tools:
        return list(messages)
    told = [turn["content"] for turn in messages[:1] if turn["role"] == "system"]
    system = "\n\n".join([*filter(None, told), described(tools)])
    return [{"role": "system", "content": system}, *messages[len(told) :]]
