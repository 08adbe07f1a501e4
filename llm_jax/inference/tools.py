"""Tools that a model may call while it answers: <T_C>{"name": "calculator", "arguments": {…}}</T_C>.

    answered(speaker, messages, toolbox())     # the turns of its calls, of their results, and its answer

A call is text that a stranger wrote. It is parsed, checked against the tool's schema, and what it asks for is
computed by a tool that reads data (calculator, calendar) or by Python in a sandbox (sandbox.py).
Whatever is wrong with a call is its result, so that the model can go on.
"""

import ast
import datetime
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llm_jax.config import UserError, nearest
from llm_jax.data import turns
from llm_jax.data.templates import CLOSE, OPEN, Message
from llm_jax.inference import sandbox
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.sampling import Sampling

MOST_CALLS = 4  # in one answer
LONGEST_CALL, LONGEST_RESULT = 8_000, 2_000  # characters
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class CallError(ValueError):
    """What is wrong with a call, in words for the model."""


class Tool(NamedTuple):
    """parameters: a JSON schema of an object, of the keywords in `_KEYWORDS`. run: from checked arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., str]

    @property
    def told(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


def toolbox(names: Sequence[str] = ("calculator", "calendar", "python")) -> dict[str, Tool]:
    """Built-in tools by name; raises UserError for others, and where a sandbox isn't there."""
    for name in names:
        if name not in TOOLS:
            raise UserError(f"no tool {name!r}; {nearest(name, TOOLS)}")
        if name in sandbox.NEEDS:
            sandbox.NEEDS[name]()
    return {name: TOOLS[name] for name in names}


def described(tools: Mapping[str, Tool]) -> str:
    """What a model is told about its tools."""
    return turns.described([tool.told for tool in tools.values()])


def introduced(messages: Sequence[Message], tools: Mapping[str, Tool]) -> list[Message]:
    """A conversation at whose beginning a model is told about its tools, behind its system message."""
    return turns.introduced(messages, [tool.told for tool in tools.values()])


def crowded(speaker: Speaker, tools: Mapping[str, Tool]) -> str:
    """A line where that takes over half of a model's context, "" elsewhere; UserError where it takes all."""
    if not tools or (context := speaker.opened.context) is None:
        return ""
    hello = [{"role": "user", "content": "Hello"}]
    taken = len(speaker.ids(introduced(hello, tools))) - len(speaker.ids(hello))
    said = f"{speaker.name}: the tools' description takes {taken:,} tokens of a context of {context:,}"
    if taken >= context:
        raise UserError(f"{said}: name fewer in --tools")
    return said if 2 * taken > context else ""


def result_of(call: str, tools: Mapping[str, Tool]) -> str:
    """The result of the text of a call, or "error: " and what is wrong with it. It never raises: a fault of
    a tool ends no conversation.
    """
    try:
        tool, arguments = parsed(call, tools)
        result = str(tool.run(**arguments)).encode(errors="replace").decode()
    except (CallError, sandbox.SandboxError) as error:
        result = f"error: {error}"
    except Exception as error:
        result = f"error: the tool failed ({type(error).__name__})"
    return result if len(result) <= LONGEST_RESULT else f"{result[:LONGEST_RESULT]}… (cut)"


def parsed(call: str, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool and the checked arguments of a call; raises CallError."""
    if len(call) > LONGEST_CALL:
        raise CallError(f"a call has at most {LONGEST_CALL} characters")
    try:
        value = json.loads(call, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise CallError('a call is JSON: {"name": "...", "arguments": {...}}') from None
    if not isinstance(value, dict) or not value.keys() <= {"name", "arguments"} or "name" not in value:
        raise CallError("a call has a name and arguments")
    if not isinstance(value["name"], str) or value["name"] not in tools:
        raise CallError(f"no tool {str(value['name'])[:40]!r}; there are: {', '.join(tools)}")
    tool, arguments = tools[value["name"]], value.get("arguments", {})
    check(arguments, tool.parameters, "arguments")
    return tool, arguments


def without_calls(text: str) -> str:
    """What a text says beside its calls, one that isn't ended included."""
    return re.sub(f"{OPEN}.*?({CLOSE}|$)", "", text, flags=re.DOTALL)


class Said(Protocol):
    """Text that a model has said, and the stop text that ended it, if any."""

    text: str
    stopped_at: str


def call_of(answer: Said) -> str | None:
    """The text of the call that an answer ends with; None where it ends with none that is finished."""
    return answer.text.rpartition(OPEN)[2] if answer.stopped_at == CLOSE and OPEN in answer.text else None


def heard(answer: Said, tools: Mapping[str, Tool], left: int = 1) -> list[Message]:
    """An answer as the assistant's turn; behind one that ends with a call, a tool's turn with the result,
    as long as there are calls `left`.
    """
    call = call_of(answer)
    if not tools or call is None:
        return [{"role": "assistant", "content": answer.text.strip()}]
    said = {"role": "assistant", "content": f"{answer.text.strip()}{CLOSE}"}
    return [said, {"role": "tool", "content": result_of(call, tools)}] if left else [said]


def answered(
    speaker: Speaker,
    messages: Sequence[Message],
    tools: Mapping[str, Tool],
    sampling: Sampling = Sampling(),
    max_tokens: int = 512,
) -> list[Message]:
    """What follows a conversation: turns of the assistant with a call and of the tool with its result, and
    the answer. After MOST_CALLS calls the model is heard once more, and its call is left at that.
    """
    found: list[Message] = []
    for left in reversed(range(MOST_CALLS + 1)):
        reply = speaker.reply([*messages, *found], sampling, max_tokens, stops=(CLOSE,))
        for _ in reply:
            pass
        turns = heard(reply.answer, tools, left)
        found += turns
        if len(turns) == 1:
            break
    return found


# ---- schemas ----

_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
_KEYWORDS = {"type", "description", "properties", "required", "enum", "items"}
_KEYWORDS |= {"minimum", "maximum", "maxLength", "maxItems"}


def check(value: Any, schema: Mapping[str, Any], place: str) -> None:
    """Raises CallError where a value isn't what the schema says. Fields that aren't named are refused.

    Raises ValueError for a schema with keywords that aren't checked here.
    """
    if unknown := schema.keys() - _KEYWORDS:
        raise ValueError(f"a schema with {', '.join(sorted(unknown))}: not checked")
    kind = schema["type"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if kind == "number" else isinstance(value, _TYPES[kind])
    if not fits or (kind == "integer" and isinstance(value, bool)):
        raise CallError(f"{place} is no {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise CallError(f"{place} is one of {', '.join(map(str, schema['enum']))}")
    if number and not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        raise CallError(f"{place} lies outside {schema.get('minimum')} .. {schema.get('maximum')}")
    longest = schema.get("maxLength" if kind == "string" else "maxItems", math.inf)
    if kind in ("string", "array") and len(value) > longest:
        raise CallError(f"{place} is longer than {longest}")
    if kind == "string" and re.search("[\0\ud800-\udfff]", value):
        raise CallError(f"{place} has characters that no text has")
    if kind == "array":
        for index, item in enumerate(value):
            check(item, schema["items"], f"{place}.{index}")
    if kind == "object":
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                raise CallError(f"{place}.{name} is missing")
        for name, item in value.items():
            if name not in properties:
                raise CallError(f"{place} has no {name[:40]!r}; there are: {', '.join(properties)}")
            check(item, properties[name], f"{place}.{name}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _schema(*required: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


# ---- the built-in tools ----

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_LARGEST = 10**60  # of a number that a calculator goes on with


def calculator(expression: str) -> str:
    """Numbers, + - * / // % ** and parentheses; anything else is refused before it is computed. Of fractions
    15 digits are told, all that floating point has for sure.
    """
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hints = {"^": "; a power is written **", ",": "; a number has no commas"}
        hint = "".join(hint for sign, hint in hints.items() if sign in expression)
        raise CallError(f"not an expression of numbers: {expression[:60]!r}{hint}") from None
    except (ZeroDivisionError, OverflowError):
        raise CallError("a division by zero or too large a number") from None
    return str(float(f"{value:.15g}") if isinstance(value, float) else value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow) and first and second * math.log10(abs(first)) > 60:
                raise OverflowError
            return _bounded(_BINARY[type(op)](first, second))
    raise ValueError


def _bounded(value: int | float) -> int | float:
    if isinstance(value, complex):
        raise ValueError
    if not abs(value) < _LARGEST:
        raise OverflowError
    return value


def calendar(date: str, days: int | None = None, weekday: str | None = None, until: str | None = None) -> str:
    """The day of a date; that in so many days; the next such weekday after it; the days until another."""
    day = _date(date)
    if sum(value is not None for value in (days, weekday, until)) > 1:
        raise CallError("give one of days, weekday and until")
    if until is not None:
        return f"{(_date(until) - day).days} days"
    if weekday is not None:
        days = (DAYS.index(weekday) - day.weekday() - 1) % 7 + 1
    try:
        day += datetime.timedelta(days or 0)
    except OverflowError:
        raise CallError("a date outside the years 1 to 9999") from None
    return f"{day.isoformat()}, {DAYS[day.weekday()]}"


def _date(text: str) -> datetime.date:
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return datetime.date.fromisoformat(text)
    except ValueError:
        pass
    raise CallError(f"not a date as YYYY-MM-DD: {text[:40]!r}")


_TEXT = {"type": "string", "maxLength": 200}
_DATE = {"type": "string", "maxLength": 10, "description": "YYYY-MM-DD"}
_CODE = _schema("code", code={"type": "string", "maxLength": 4000})
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "calculator",
            "Computes an expression of numbers.",
            _schema("expression", expression=_TEXT),
            calculator,
        ),
        Tool(
            "calendar",
            "The weekday of a date, of that in so many days, of the next such weekday; days until one.",
            _schema(
                "date",
                date=_DATE,
                days={"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000},
                weekday={"type": "string", "enum": list(DAYS)},
                until=_DATE,
            ),
            calendar,
        ),
        Tool("python", "Runs Python; the result is what it prints and its last value.", _CODE, sandbox.monty),
        Tool(
            "full_python",
            "Runs Python with its library; the result is what it prints.",
            _CODE,
            sandbox.bubblewrap,
        ),
    )
}
