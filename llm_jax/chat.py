"""A chat in the terminal or on a page, with one model or with two at once.

python -m llm_jax.chat --model=DIR|FILE.gguf|RUN --compare=OTHER --temperature=0.7
python -m llm_jax.chat --model=… --web       # the same as a page, and the OpenAI API behind it

The models keep nothing: each turn sends the whole conversation, which /context shows as they see it.
"""

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

from absl import flags

from llm_jax import command_line, values
from llm_jax.config import UserError, nearest
from llm_jax.data.templates import CLOSE, Message
from llm_jax.inference import options
from llm_jax.inference.conversation import Reply, Speaker
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.tools import MOST_CALLS, Tool, call_of, crowded, heard, introduced, toolbox
from llm_jax.process import prepare_xla

TOKEN = "LLM_JAX_TOKEN"  # in the environment, where other users of the machine don't see it

HELP = """\
/system TEXT      what the models are told first; without TEXT, nothing
/set NAME=VALUE   sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens
/context          exactly what the next turn sends
/retry            answers the last turn again
/reset            forgets the conversation
/quit             or ctrl-D; ctrl-C ends an answer"""


class Chat:
    """A conversation with each of the speakers, who hear the same and see their own answers."""

    def __init__(
        self,
        speakers: Sequence[Speaker],
        sampling: Sampling = Sampling(),
        max_tokens: int = 512,
        stops: Sequence[str] = (),
        system: str = "",
        out: TextIO = sys.stdout,
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        self.speakers, self.sampling, self.max_tokens, self.stops = speakers, sampling, max_tokens, stops
        self.system, self.out, self.tools = system, out, tools or {}
        # What was said, and what each speaker answered: one turn, or with calls of tools several.
        self.turns: list[tuple[str, list[list[Message]]]] = []

    def messages(self, number: int, said: str | None = None) -> list[Message]:
        """The conversation as one speaker sees it, and then `said`."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for user, answers in self.turns:
            found += [{"role": "user", "content": user}, *answers[number]]
        found += [{"role": "user", "content": said}] if said is not None else []
        return introduced(found, self.tools)

    def say(self, said: str) -> None:
        """A turn; raises UserError, and leaves the conversation as it was, where it can't be answered."""
        answers: list[list[Message]] = [[] for _ in self.speakers]
        waiting = list(range(len(self.speakers)))
        for left in reversed(range(MOST_CALLS + 1)):
            replies = self._heard(waiting, said, answers)
            for number, reply in replies.items():
                answers[number] += heard(reply.answer, self.tools, left)
                name = self.speakers[number].name
                self._write(f"[{name}: {reply}]\n")
                if not left and call_of(reply.answer) is not None:
                    self._write(f"[{name} has had its {MOST_CALLS} calls: this one is not run]\n")
            waiting = [number for number in waiting if answers[number][-1]["role"] == "tool"]
            for number in waiting:
                self._write(f"[{self.speakers[number].name} is told: {answers[number][-1]['content']}]\n")
            if not waiting:
                break
        self.turns.append((said, answers))

    def _heard(self, waiting: list[int], said: str, answers: list[list[Message]]) -> dict[int, Reply]:
        """The next reply of those whose turn it is, shown as it comes."""
        replies: dict[int, Reply] = {}
        stops = (*self.stops, *(CLOSE for _ in self.tools))
        try:
            for number in waiting:
                messages = [*self.messages(number, said), *answers[number]]
                replies[number] = self.speakers[number].reply(messages, self.sampling, self.max_tokens, stops)
            self._show(replies)
        except KeyboardInterrupt:
            self._write("\n(interrupted)\n")
        finally:
            for reply in replies.values():
                reply.close()
        return replies

    def command(self, line: str) -> bool:
        """A line that begins with a slash; False ends the chat."""
        name, _, rest = line[1:].partition(" ")
        commands = {
            "system": lambda: setattr(self, "system", rest.strip()),
            "set": lambda: self._set(rest.strip()),
            "context": self._context,
            "retry": self._retry,
            "reset": self.turns.clear,
            "help": lambda: self._write(HELP + "\n"),
        }
        if name in ("quit", "exit"):
            return False
        if name not in commands:
            raise UserError(f"no command /{name}; {nearest('/' + name, ['/' + known for known in commands])}")
        commands[name]()
        return True

    # ---- commands ----

    def _set(self, text: str) -> None:
        kinds = values.hints(Sampling) | {"max_tokens": int}
        kinds.pop("logit_bias")
        name, equals, value = text.partition("=")
        if text and (not equals or name not in kinds):
            hint = "" if name in kinds else f"; {nearest(name, kinds)}"
            raise UserError(f"/set {text}: write NAME=VALUE{hint}")
        if name == "max_tokens":
            if (most := values.parse(int, value, f"/set {name}")) < 1:
                raise UserError(f"max_tokens is {most}; it is at least 1")
            self.max_tokens = most
        elif text:
            parsed = values.parse(kinds[name], value, f"/set {name}")
            changed = dataclasses.replace(self.sampling, **{name: parsed})
            changed.check(self.speakers[0].opened.config.vocabulary)
            self.sampling = changed
        now = {name: getattr(self.sampling, name, self.max_tokens) for name in kinds}
        self._write("  ".join(f"{name}={value}" for name, value in now.items()) + "\n")

    def _context(self) -> None:
        for number, speaker in enumerate(self.speakers):
            messages = self.messages(number, "…")
            self._write(
                f"--- {speaker.name}: {len(speaker.ids(messages)):,} tokens, … is what you say next\n"
            )
            self._write(f"{speaker.text(messages)}\n---\n")

    def _retry(self) -> None:
        if not self.turns:
            raise UserError("/retry: nothing has been said yet")
        said, answers = self.turns.pop()
        try:
            self.say(said)
        except UserError:
            self.turns.append((said, answers))
            raise

    # ---- what is shown ----

    def _show(self, asked: Mapping[int, Reply]) -> None:
        replies = list(asked.values())
        if len(replies) == 1:
            for piece in replies[0]:
                self._write(piece)
            self._write("\n")
            return
        names = [self.speakers[number].name for number in asked]
        streams, drawn = [iter(reply) for reply in replies], 0
        width, height = shutil.get_terminal_size()
        live = self.out.isatty()
        while streams:
            streams = [stream for stream in streams if next(stream, None) is not None]
            if live:
                rows = beside(names, [reply.answer.text for reply in replies], width)
                drawn = self._draw(rows[:1] + rows[1:][-(height - 3) :], drawn)
        self._draw(beside(names, [reply.answer.text for reply in replies], width), drawn)

    def _draw(self, rows: list[str], before: int) -> int:
        """Rows in the place of those drawn before."""
        self._write(f"\x1b[{before}A\x1b[J" * (before > 0) + "".join(f"{row}\n" for row in rows))
        return len(rows)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def beside(names: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Rows of `width` characters with the texts in columns under their names."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [
        [
            name[:each],
            *(row for line in text.strip().splitlines() for row in textwrap.wrap(line, each) or [""]),
        ]
        for name, text in zip(names, texts, strict=True)
    ]
    height = max(map(len, columns))
    filled = [[*column, *[""] * (height - len(column))] for column in columns]
    return [" | ".join(cell.ljust(each) for cell in row).rstrip() for row in zip(*filled, strict=True)]


def talk(chat: Chat, ask: TextIO) -> None:
    """Reads lines until the end; a mistake is one line, and the chat goes on."""
    asking = ask.isatty()
    while True:
        try:
            line = input("> ") if asking else ask.readline()
            if not asking and not line:
                return
            line = line.strip()
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.say(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def opened(tools: Mapping[str, Tool], **batch: int) -> list[Speaker]:
    """The speakers that --model and --compare name, which have room for `tools`; batch: of each, as `Speaker`
    has it.
    """
    f = flags.FLAGS
    found = [options.opened(path) for path in (f.model, f.compare) if path]
    if len(found) == 2 and found[0].name == found[1].name:
        found[1] = found[1]._replace(name=f"{found[1].name} (2)")
    for one in found:
        if one.tokenizer is None:
            raise UserError(f"{one.name} has no tokenizer: it can't be talked to")
        options.sampling().check(one.config.vocabulary)
    speakers = [Speaker(one, keep=False, **batch) for one in found]
    for line in filter(None, (crowded(speaker, tools) for speaker in speakers)):
        print(line)
    return speakers


def web() -> None:
    f = flags.FLAGS
    try:
        from llm_jax.inference import api, server
    except ImportError as error:
        raise UserError(f"--web needs the extra `web` (pip install 'llm-jax[web]'): {error}") from None
    token = os.environ.get(TOKEN) or None if f.token is None else f.token
    tools = toolbox(f.tools)
    with server.listen(f.host, f.port, token) as socket:
        defaults = {"system": f.system, "max_tokens": f.max_tokens, "stop": f.stop}
        defaults |= dataclasses.asdict(options.sampling())
        speakers = opened(tools, slots=f.slots, candidates=api.CANDIDATES)
        server.serve(speakers, socket, token, defaults, tools)


def main() -> None:
    f = flags.FLAGS
    prepare_xla(deterministic=False)
    if not f.model:
        raise UserError(
            "--model is missing: a directory in Hugging Face's format, a .gguf file or a run's folder"
        )
    options.check(slots=1)
    if f.web:
        return web()
    tools = toolbox(f.tools)
    chat = Chat(opened(tools), options.sampling(), f.max_tokens, tuple(f.stop), f.system, tools=tools)
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then edits and remembers lines)

        print(f"{' and '.join(speaker.name for speaker in chat.speakers)}; /help lists the commands")
    talk(chat, sys.stdin)


if __name__ == "__main__":
    options.define(max_tokens=512)
    flags.DEFINE_string("compare", None, "another model, which answers beside the first")
    flags.DEFINE_string("system", "", "what the models are told first")
    flags.DEFINE_list("tools", [], "what the models may call: calculator, calendar, python, full_python")
    flags.DEFINE_bool("web", False, "a page instead of the terminal, and the OpenAI API under /v1")
    flags.DEFINE_string("host", "127.0.0.1", "where --web is served; elsewhere than on loopback with --token")
    flags.DEFINE_integer("port", 8000, "of --web; 0 takes a free one")
    flags.DEFINE_string("token", None, f"what who asks --web has to show (or in {TOKEN})")
    flags.DEFINE_integer("slots", 8, "how many answers --web decodes at once")
    command_line.run_main(main)
