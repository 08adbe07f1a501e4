"""Conversations as text: the Jinja templates of tokenizers, in a sandbox, rendered as transformers does."""

import contextlib
import datetime
import functools
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_jax.config import UserError

Message = Mapping[str, Any]  # at least {"role": "system" | "user" | "assistant", "content": text}

# For a model that was never shown conversations: a transcript, which it goes on with.
TRANSCRIPT = """\
{%- for message in messages -%}
{{ message.role | capitalize ~ ': ' if message.role != 'system' }}{{ message.content ~ '\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt }}"""
TRANSCRIPT_STOPS = ("\nUser:",)

OPEN, CLOSE = "<T_C>", "</T_C>"  # around the call of a tool, inside what the assistant says
EOS = "<|endoftext|>"  # what a template writes for the end of a text, whatever a tokenizer calls it
MARKS = "\ufdd0", "\ufdd1"  # around what {% generation %} wraps: for such ends Unicode has them

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"""
PLAIN = """\
{%- for message in messages -%}
{{ message.role | capitalize ~ ': ' ~ message.content ~ (eos_token if message.role == 'assistant') ~ '\\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt }}"""


class Template(NamedTuple):
    """A chat template, the special tokens that it writes beside EOS, and the one that ends an answer.

    end: "" where none does. roles: what it calls bos_token, eos_token … where somebody says so.
    """

    text: str
    special: tuple[str, ...]
    end: str
    roles: Mapping[str, str]


class _Generation(jinja2.ext.Extension):
    """{% generation %}: what the assistant says itself, put between MARKS."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 asks for it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return caller().join(MARKS)


def check(template: str) -> None:
    """Raises UserError where the template isn't Jinja."""
    try:
        _compiled(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template: {_why(error)}") from None


def render(
    template: str, messages: Sequence[Message], special: Mapping[str, str], answer: bool = True, **facts: Any
) -> str:
    """The text of a conversation; answer: it ends where the assistant's next turn begins.

    special: tokens by role (bos_token, …). facts: whatever else the template asks for, such as tools.
    Raises UserError where the template is broken or refuses the messages: it is a program of whoever wrote
    it, and may fail in any way.
    """
    return re.sub("|".join(MARKS), "", _marked(template, messages, special, answer, **facts))


def _marked(
    template: str, messages: Sequence[Message], special: Mapping[str, str], answer: bool, **facts: Any
) -> str:
    """The text with its MARKS."""
    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=answer, **{"tools": None, **special, **facts}
        )
    except Exception as error:
        raise UserError(f"the chat template: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def lead(template: str, special: Mapping[str, str]) -> str:
    """The white space with which an answer begins: what stands between its prompt and its first letter."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before, after = render(template, talk[:1], special), render(template, talk, special, answer=False)
    said = after[len(before) :] if after.startswith(before) else ""
    return said[: len(said) - len(said.lstrip())]


def pieces(
    template: str, messages: Sequence[Message], special: Mapping[str, str], ends: Sequence[str], **facts: Any
) -> list[tuple[str, bool]]:
    """A conversation's text in pieces, each with whether the assistant says it.

    Said is what {% generation %} wraps, where the template has that. Else an answer is what follows the text
    that the model is prompted with, so that it is taught what it will be asked for, to the last of the tokens
    `ends` in it (to its last letter where it has none). A turn of weight 0 counts as said by another. Raises
    UserError where the template refuses, or writes a turn otherwise once others follow it.
    """
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    silent = {number for number in spoken if messages[number].get("weight") == 0}
    if re.search(r"{%[-+]?\s*generation\b", template):

        def marked(end: int) -> list[str]:
            return re.split("|".join(MARKS), _marked(template, messages[:end], special, False, **facts))

        unsaid = {part for at in silent for part in range(len(marked(at)) if at else 0, len(marked(at + 1)))}
        parts = enumerate(marked(len(messages)))
        return [(text, at % 2 == 1 and at not in unsaid) for at, text in parts if text]
    whole, out, done = render(template, messages, special, answer=False, **facts), [], 0
    for number in spoken:
        before = render(template, messages[:number], special, answer=True, **facts)
        after = render(template, messages[: number + 1], special, answer=False, **facts)
        if not after.startswith(before) or not whole.startswith(after):
            raise UserError("the chat template writes a turn otherwise once others follow it")
        said = after[len(before) :]
        end = max((said.rfind(name) + len(name) for name in ends if name in said), default=len(said))
        end = len(said) if said[end:].strip() else end
        out += [(whole[done : len(before)], False), (said[:end], number not in silent)]
        done = len(before) + end
    return [piece for piece in [*out, (whole[done:], False)] if piece[0]]


@functools.lru_cache(maxsize=64)
def named(text: str, names: tuple[str, ...] = (), roles: tuple[tuple[str, str], ...] = ()) -> Template:
    """The template of a text, with the tokens that it writes about a short conversation, in order.

    names: special tokens that a tokenizer has; others are called <|like this|>, in one word. Raises UserError
    where the text is no template or refuses a question and its answer.
    """
    special = {"bos_token": EOS, "eos_token": EOS, **dict(roles)}
    longest_first = sorted(names, key=len, reverse=True)
    name = "|".join([*map(re.escape, longest_first), r"<\|\w+\|>"])
    question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said = [piece for piece, spoken in pieces(text, question, special, (*names, EOS)) if spoken]
    ends = re.findall(f"({name})\\s*$", said[-1]) if said else []
    written = render(text, question, special)
    for others in (["system"], ["tool", "assistant"], ["system", "tool", "assistant"]):
        with contextlib.suppress(UserError):  # not all templates have a place for them
            talk = [{"role": role, "content": "c"} for role in others]
            at = others[:1] == ["system"]
            written += render(text, [*talk[:at], *question, *talk[at:], *question], special)
    found = [token for token in dict.fromkeys(re.findall(name, written)) if token != EOS or EOS in names]
    return Template(text, tuple(found), "".join(ends), types.MappingProxyType(dict(roles)))


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter also escapes what HTML would misread."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


BUILT_IN = {
    "chatml": named(CHATML),
    "llama3": named(LLAMA3, roles=(("bos_token", "<|begin_of_text|>"),)),
    "plain": named(PLAIN),
}
