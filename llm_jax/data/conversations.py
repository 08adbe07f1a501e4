"""Conversations in files: the common formats as lists of messages, and why others were left out.

    found = read(["chats.jsonl"], "auto")
    found.kept, found.dropped        # lists of messages; {"no assistant turn": 3, ...}

Formats, told apart by the field that a record has:

    messages      {"messages": [{"role": "user", "content": "Hi"}, ...]}
    sharegpt      {"conversations": [{"from": "human", "value": "Hi"}, ...]}
    topical_chat  {"content": [{"agent": "agent_1", "message": "Hi"}, ...]}; the second to speak assists
    alpaca        {"instruction": "Add.", "input": "1, 2", "output": "3"}; "response" is an output too
    completion    {"prompt": "1 + 2 =", "completion": " 3"}

A file is .jsonl (a record a line), .json (a list of records, or an object of them) or .parquet (a record a
row), each packed (.gz, .xz, .zst) or not.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax.config import UserError, nearest
from llm_jax.data import readers
from llm_jax.data.templates import Message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

Conversation = list[Message]


@dataclasses.dataclass(frozen=True)
class Found:
    """The conversations of some files. dropped: how many records were left out, by the reason."""

    kept: list[Conversation]
    dropped: Mapping[str, int]


class UnusableError(ValueError):
    """Why a record is no conversation."""


def read(paths: Sequence[str | pathlib.Path], form: str = "auto") -> Found:
    """The conversations of all files, in order; `form` is one of FORMATS, or "auto".

    Raises UserError for a file that is missing, damaged or of another kind, and where no record is usable.
    """
    if form not in (*FORMATS, "auto"):
        raise UserError(f"no format {form!r} of conversations; {nearest(form, [*FORMATS, 'auto'])}")
    kept, dropped = [], collections.Counter[str]()
    for path in map(pathlib.Path, paths):
        for place, record in readers.records(path, "conversations"):
            reader = FORMATS[_form_of(record, place) if form == "auto" else form]
            try:
                messages = reader(record)
                check(messages)
                kept.append(messages)
            except UnusableError as reason:
                dropped[str(reason)] += 1
            except (LookupError, TypeError, AttributeError, ValueError):
                dropped["a field missing or of another kind"] += 1
    if not kept:
        reasons = "; ".join(f"{count} have {reason}" for reason, count in dropped.items()) or "no record"
        raise UserError(f"no conversation in {', '.join(map(str, paths))}: {reasons}")
    return Found(kept, dict(dropped))


def check(messages: Conversation) -> None:
    """Raises UnusableError, with the reason, for what nobody could be taught by."""
    roles = [message.get("role") for message in messages]
    if not messages:
        raise UnusableError("no turn")
    if None in roles:
        raise UnusableError("a turn without a role")
    if unknown := [role for role in roles if role not in ROLES]:
        raise UnusableError(f"the unknown role {unknown[0]!r}")
    if roles.count("system") > 1:
        raise UnusableError("two system messages")
    if "system" in roles[1:]:
        raise UnusableError("a system message that isn't the first")
    if "assistant" not in roles:
        raise UnusableError("no assistant turn")
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise UnusableError("a turn without text")
        if message["role"] != "system" and not message["content"].strip():
            raise UnusableError("an empty turn")
        if re.search("[\ud800-\udfff\ufdd0-\ufdef]", message["content"]):
            raise UnusableError("half a surrogate or a noncharacter")


# ---- formats ----


def _messages(record: Mapping[str, Any]) -> Conversation:
    return [dict(message) for message in record["messages"]]


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = record["conversations"]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return system + [
        {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns
    ]


def _topical_chat(record: Mapping[str, Any]) -> Conversation:
    """Who speaks first is the user; turns of one speaker that follow each other are one."""
    out: Conversation = []
    first = record["content"][0]["agent"]
    for turn in record["content"]:
        role = "user" if turn["agent"] == first else "assistant"
        if out and out[-1]["role"] == role:
            out[-1] = {"role": role, "content": f"{out[-1]['content']}\n{turn['message']}"}
        else:
            out.append({"role": role, "content": turn["message"]})
    return out


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    answer = record["output"] if "output" in record else record["response"]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _completion(record: Mapping[str, Any]) -> Conversation:
    turns = zip(("user", "assistant"), (record["prompt"], record["completion"]), strict=True)
    return [{"role": role, "content": text} for role, text in turns]


FORMATS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "topical_chat": _topical_chat,
    "alpaca": _alpaca,
    "completion": _completion,
}
_FIELDS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "content": "topical_chat",
    "instruction": "alpaca",
    "prompt": "completion",
}


def _form_of(record: Any, place: str) -> str:
    fields = list(record) if isinstance(record, Mapping) else []
    for field, form in _FIELDS.items():
        if field in fields:
            return form
    known = ", ".join(_FIELDS)
    raise UserError(f"{place}: no conversation has the fields {fields}; each has one of {known}")
