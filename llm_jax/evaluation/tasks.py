"""Tasks: a file of questions and a few fields that say how they are asked and judged.

    {"kind": "multiple_choice", "file": "riddles.jsonl", "question": "{riddle}\\nAnswer:",
     "choices": "options", "answer": "right"}

is a task file (riddles.json): `{field}` stands for a field of a record. Without a chat template an item is a
text, "question answer", the examples before it apart by empty lines; with one, question and answer are turns.
"""

import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llm_jax import config as configs
from llm_jax.config import Tagged, UserError
from llm_jax.data import readers, templates
from llm_jax.data.cache import digest
from llm_jax.data.templates import TRANSCRIPT_STOPS, Message
from llm_jax.evaluation.forms import READERS
from llm_jax.evaluation.requests import Answered, LogLikelihood, Request
from llm_jax.inference.opening import Opened
from llm_jax.interop.tokenizer import Portable, written

HIGHEST, LOWEST, NEITHER = "highest", "lowest", ""
Score = tuple[float, float]  # what an item adds to a metric's sum and to its count
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Format:
    """How items are written: as turns of the chat template (`chat`) or as text, after `few_shot` examples."""

    chat: bool = False
    few_shot: int = 0

    def __str__(self) -> str:
        return ("chat" if self.chat else "raw") + f", {self.few_shot} shots" * bool(self.few_shot)


@dataclasses.dataclass(frozen=True)
class Item:
    """A record and where it stands; shots: the examples asked and answered before it."""

    place: str
    record: Record
    shots: tuple[Record, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task(Tagged):
    """file: beside the task's own file, or in the folder of task data. within: where in a .json the list is.

    reader: one of READERS, for files that aren't made of plain fields. examples: another file for those of
    few-shot prompts. group: a field by whose values the scores are told too. together: a field; items that
    have its value in common are no independent draws, and intervals say so.
    """

    file: str = ""
    reader: str = "plain"
    within: str = ""
    examples: str = ""
    group: str = ""
    together: str = ""

    metrics: ClassVar[Mapping[str, str]] = {}  # that it scores, by which value is best

    def about(self, opened: Opened) -> "Task":
        """The task as it is asked of this model."""
        return self

    def items(self, folder: pathlib.Path, few_shot: int = 0, limit: int | None = None) -> list[Item]:
        """The items: all, or a fair sample of `limit` that larger ones contain.

        Raises UserError that names file, line and field of a record that can't be asked.
        """
        found = self._records(folder / self.file)
        pool = self._records(folder / self.examples) if self.examples else found
        if few_shot >= len(pool) + bool(self.examples):
            raise UserError(f"{self.file}: {len(pool)} records, which give no {few_shot} examples for each")
        shots = [record for _, record in random.Random(0).sample(pool, min(few_shot + 1, len(pool)))]
        order = sorted(found, key=lambda one: digest(repr(one[1]).encode())) if limit is not None else found
        return [
            Item(place, record, tuple([shot for shot in shots if shot is not record][:few_shot]))
            for place, record in order[:limit]
        ]

    def requests(self, item: Item, ask: "Asker") -> list[Request]:
        """What is asked of the model about an item."""
        raise NotImplementedError

    def further(self, item: Item, ask: "Asker", answers: Sequence[Answered]) -> list[Request]:
        """What is asked next, after so many answers (a tool's result is told, say); [] ends the item."""
        return []

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        """What the answers to all its requests are worth, by metric; {} where nothing can be said."""
        raise NotImplementedError

    def check(self, record: Record) -> None:
        """Raises KeyError or ValueError for a record that can't be asked."""
        raise NotImplementedError

    def _records(self, path: pathlib.Path) -> list[tuple[str, Record]]:
        if self.reader not in READERS:
            raise UserError(f"no reader {self.reader!r}; {configs.nearest(self.reader, READERS)}")
        found = []
        for place, record in readers.records(path, "tasks", (".csv", ".txt"), self.within):
            if not isinstance(record, dict):
                raise UserError(f"{place} is no object with fields: {str(record)[:40]!r}")
            sound(record, place)
            try:
                record = READERS[self.reader](record)
                self.check(record)
                _ = [field(record, name) for name in (self.group, self.together) if name]
            except KeyError as error:
                raise UserError(f"{place} has no field {error}; it has {', '.join(record)}") from None
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
            found.append((place, record))
        if not found:
            raise UserError(f"{path} has no items")
        return found


@dataclasses.dataclass(frozen=True)
class Asker:
    """Writes prompts in a format for a tokenizer. One without a chat template is asked in a transcript.

    borrowed: who is asked has another tokenizer, for which what ends a turn may be text.
    """

    form: Format
    tokenizer: Portable | None
    borrowed: bool = False

    @property
    def written(self) -> bool:
        """Whether a template writes all special tokens itself."""
        return self.form.chat and self.tokenizer is not None and self.tokenizer.chat_template is not None

    def prompt(self, question: str, shots: Sequence[tuple[str, str]] = ()) -> str:
        """The text that the answer follows."""
        if not self.form.chat:
            return "".join(f"{asked}{joined(asked, answer)}\n\n" for asked, answer in shots) + question
        turns = [
            {"role": role, "content": text.strip()}
            for pair in (*shots, (question,))
            for role, text in zip(("user", "assistant"), pair, strict=False)
        ]
        return self.rendered(turns)

    def after_tools(self, question: str, turns: Sequence[Message]) -> str:
        """The text that goes on after turns with calls and turns of tools with their results."""
        if self.form.chat:
            return self.rendered([{"role": "user", "content": question.strip()}, *turns])
        text = question
        for turn in turns:
            said = turn["content"]
            text += f"\nResult: {said}\n" if turn["role"] == "tool" else joined(text, said)
        return text

    def rendered(self, turns: Sequence[Message]) -> str:
        """Turns as text, to where the assistant's next one begins."""
        return written(self.tokenizer, turns)

    def scored(self, question: str, answer: str, shots: Sequence[tuple[str, str]] = ()) -> LogLikelihood:
        """Asks how probable the answer is: said behind a turn's prompt, or going on with a text."""
        prompt = self.prompt(question, shots)
        if not self.written:
            return LogLikelihood(prompt, joined(question, answer))
        lead = templates.lead(self.tokenizer.chat_template, self.tokenizer.special)
        said = self.tokenizer.names.broken(lead + answer.lstrip())
        return LogLikelihood(prompt, said, written=True, apart=True)

    def stops(self, of_text: tuple[str, ...]) -> tuple[str, ...]:
        """What ends a written answer: a turn ends itself, but for those of a transcript or a borrowed one."""
        if not self.form.chat:
            return of_text
        if not self.written:
            return TRANSCRIPT_STOPS
        return tuple(filter(None, [self.tokenizer.template.end])) if self.borrowed else ()


def joined(question: str, answer: str) -> str:
    """`answer` with the space that parts it from `question`."""
    return answer if not question or question[-1].isspace() or answer[:1].isspace() else f" {answer}"


def field(record: Record, name: str) -> Any:
    """A field of a record; raises KeyError for one that isn't there, ValueError for one that is null."""
    if record[name] is None:
        raise ValueError(f"the field {name!r} is null")
    return record[name]


def filled(template: str, record: Record) -> str:
    """`template` with each {field} replaced by the record's; raises as `field`."""
    return re.sub(r"\{([^{}]+)\}", lambda found: str(field(record, found[1])).strip(), template)


def sound(value: Any, place: object) -> None:
    """Raises UserError where a text is no Unicode: JSON can spell half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 20) : error.start]
        raise UserError(f"{place} has half a surrogate pair behind {before!r}") from None
