"""Conversations in files: the common formats as lists of messages, and why others were left out.

    found = read(["chats.jsonl"], "auto")
    found.kept, found.dropped        # lists of messages; {"no assistant turn": 3, ...}

Formats, told apart by the field that a record has:

    messages      {"messages": [{"role": "user", "content": "Hi"}, ...]}
    sharegpt      {"conversations": [{"from": "human", "value": "Hi"}, ...]}, or with role and content
    topical_chat  {"content": [{"agent": "agent_1", "message": "Hi"}, ...]}; the second to speak assists
    alpaca        {"instruction": "Add.", "input": "1, 2", "output": "3"}; "response" is an output too, and
                  "history" has the pairs of turns before
    completion    {"prompt": "1 + 2 =", "completion": " 3"}, both as text or as lists of messages

A record of any format may have "system" and "tools" (their names, descriptions and parameters). A turn may
have parts of text as its content, one of "tool_calls", and the "weight" 0: it is read, not trained on.

A file is .jsonl (a record a line), .json (a list of records, an object of them or with them under "data", or
one) or .parquet (a record a row), each packed (.gz, .xz, .zst) or not.
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
from llm_jax.data.turns import UnusableError, field, introduced, tools, turn

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

Conversation = list[Message]


class Dropped(collections.Counter[str]):
    """How many records were left out, by the reason. first: where the first such stands."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, error: UnusableError, place: str) -> None:
        self[str(error)] += 1
        self.first.setdefault(str(error), ", ".join(filter(None, (place, error.detail))))

    def __str__(self) -> str:
        return "; ".join(f"{count:,} have {why} (first {self.first[why]})" for why, count in self.items())


@dataclasses.dataclass(frozen=True)
class Found:
    """The conversations of some files, and where each of them stands."""

    kept: list[Conversation]
    places: list[str]
    dropped: Dropped


def read(paths: Sequence[str | pathlib.Path], form: str = "auto") -> Found:
    """The conversations of all files, in order; `form` is one of FORMATS, or "auto".

    Raises UserError for a file that is missing, damaged or of another kind, and where no record is usable.
    """
    if form not in (*FORMATS, "auto"):
        raise UserError(f"no format {form!r} of conversations; {nearest(form, [*FORMATS, 'auto'])}")
    found = Found([], [], Dropped())
    for path in map(pathlib.Path, paths):
        for place, record in readers.records(path, "conversations", within="data", alone=_form_of):
            try:
                found.kept.append(_conversation(record, form))
                found.places.append(place)
            except UnusableError as error:
                found.dropped.add(error, place)
    if not found.kept:
        raise UserError(f"no conversation in {', '.join(map(str, paths))}: {found.dropped or 'no record'}")
    return found


def _conversation(record: Any, form: str) -> Conversation:
    """The messages of a record, the system's and what it says of tools first; raises UnusableError."""
    if (form := _form_of(record) if form == "auto" else form) is None:
        fields = ", ".join(record) if isinstance(record, Mapping) else "none"
        raise UnusableError(f"none of the fields {', '.join(_FIELDS)}", f"which has {fields}"[:100])
    try:
        messages = [turn(message) for message in FORMATS[form](record)]
        if system := record.get("system"):
            told = {"role": "system", "content": system}
            messages = messages if messages[:1] == [told] else [told, *messages]
        check(messages)
        messages = introduced(messages, tools(record.get("tools") or record.get("functions")))
        check(messages)
        return messages
    except UnusableError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UnusableError("a field of another kind") from None


def check(messages: Conversation) -> None:
    """Raises UnusableError, with the reason, for what nobody could be taught by."""
    roles = [message.get("role") for message in messages]
    if not messages:
        raise UnusableError("no turn")
    if None in roles:
        raise UnusableError("a turn without a role")
    if unknown := [role for role in roles if role not in ROLES]:
        raise UnusableError(f"a role other than {', '.join(ROLES)}", repr(unknown[0])[:40])
    if roles.count("system") > 1:
        raise UnusableError("two system messages")
    if "system" in roles[1:]:
        raise UnusableError("a system message that isn't the first")
    if all(turn["role"] != "assistant" or turn.get("weight") == 0 for turn in messages):
        raise UnusableError("no assistant turn" + " that counts" * ("assistant" in roles))
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise UnusableError("a turn without text")
        if message["role"] != "system" and not message["content"].strip():
            raise UnusableError("an empty turn")
        if re.search("[\ud800-\udfff\ufdd0-\ufdef]", message["content"]):
            raise UnusableError("half a surrogate or a noncharacter")


# ---- formats ----


def _messages(record: Mapping[str, Any]) -> Conversation:
    return field(record, "messages", list)


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    return [
        turn if isinstance(turn, Mapping) and "role" in turn else _of_sharegpt(turn)
        for turn in field(record, "conversations", list)
    ]


def _of_sharegpt(turn: Any) -> Message:
    speaker, said = field(turn, "from"), field(turn, "value")
    told = {"function_call": said} if speaker == "function_call" else {"content": said}
    more = {name: turn[name] for name in turn if name not in ("from", "value")}
    return {"role": SHAREGPT_ROLES.get(speaker, speaker)} | told | more


def _topical_chat(record: Mapping[str, Any]) -> Conversation:
    """Who speaks first is the user; turns of one speaker that follow each other are one."""
    out: Conversation = []
    turns = field(record, "content", list)
    for said in turns:
        role = "user" if field(said, "agent") == turns[0]["agent"] else "assistant"
        text = field(said, "message")
        if out and out[-1]["role"] == role:
            out[-1] = {"role": role, "content": f"{out[-1]['content']}\n{text}"}
        else:
            out.append({"role": role, "content": text})
    return out


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    asked = [field(record, "instruction"), field(record, "input") if record.get("input") else ""]
    answer = field(record, "response" if "response" in record and "output" not in record else "output")
    pairs = [*(record.get("history") or ()), ("\n\n".join(filter(None, asked)), answer)]
    return [turn for pair in pairs for turn in _pair(*pair)]


def _completion(record: Mapping[str, Any]) -> Conversation:
    """Of a prompt of several turns only the completion is trained on."""
    if isinstance(record.get("prompt"), str):
        return _pair(record["prompt"], field(record, "completion"))
    before = [dict(turn) | {"weight": 0} for turn in field(record, "prompt", list)]
    return [*before, *field(record, "completion", list)]


def _pair(asked: str, answer: str) -> Conversation:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


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


def _form_of(record: Any) -> str | None:
    """The format of a record; None where it has the fields of none."""
    fields = record if isinstance(record, Mapping) else ()
    return next((form for name, form in _FIELDS.items() if name in fields), None)
