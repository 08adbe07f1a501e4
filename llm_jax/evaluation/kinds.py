"""The kinds of tasks: what is asked about an item, and what the answers are worth."""

import dataclasses
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from llm_jax.config import UserError
from llm_jax.evaluation import checks
from llm_jax.evaluation.requests import Answered, Generate, Request, Rolling
from llm_jax.evaluation.tasks import (
    HIGHEST,
    LOWEST,
    NEITHER,
    Asker,
    Item,
    Record,
    Score,
    Task,
    filled,
    joined,
)
from llm_jax.values import check_least


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Task, kind="multiple_choice"):
    """The choice that the model finds most probable is its answer.

    choices: the field that has the list. fixed: the choices, where all items have the same. answer: the field
    of the right one's number, letter or text. ending: where a text follows the choice and is scored in its
    place (Winograd schemas).
    """

    question: str = "{question}\nAnswer:"
    choices: str = "choices"
    fixed: tuple[str, ...] = ()
    answer: str = "answer"
    ending: str = ""

    metrics: ClassVar = dict.fromkeys(
        ("accuracy", "accuracy_by_token", "accuracy_by_byte", "probability"), HIGHEST
    )

    def check(self, record: Record) -> None:
        asked = [(question, answer.strip()) for question, answer in self._pairs(record)]
        right = asked[self._right(record)]
        if not right[1]:
            raise ValueError(f"the ending {self.ending!r} is empty")
        if asked.count(right) > 1:
            raise ValueError(f"two choices are the right one: {right[1]!r}")

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        shots = [self._pairs(record)[self._right(record)] for record in item.shots]
        return [ask.scored(question, answer, shots) for question, answer in self._pairs(item.record)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        right = self._right(item.record)
        nats = [answer.nats for answer in answers]
        sizes = [len(text.encode()) for _, text in self._pairs(item.record)]
        costs = {
            "accuracy": nats,
            "accuracy_by_token": [answer.nats / answer.tokens for answer in answers],
            "accuracy_by_byte": [one / size for one, size in zip(nats, sizes, strict=True)],
        }
        if any(map(math.isnan, nats)) or not math.isfinite(min(nats)):  # a model that diverged is never right
            return dict.fromkeys([*costs, "probability"], (0.0, 1.0))
        weights = [math.exp(min(nats) - one) for one in nats]
        return {name: (float(cost.index(min(cost)) == right), 1.0) for name, cost in costs.items()} | {
            "probability": (weights[right] / sum(weights), 1.0)
        }

    def _pairs(self, record: Record) -> list[tuple[str, str]]:
        """What is asked and what is scored, for each choice."""
        question = filled(self.question, record)
        if self.ending:
            ending = filled(self.ending, record)
            return [(question + joined(question, choice), ending) for choice in self._choices(record)]
        return [(question, choice) for choice in self._choices(record)]

    def _choices(self, record: Record) -> list[str]:
        found = list(self.fixed) or record[self.choices]
        if not isinstance(found, list) or not all(isinstance(x, str) and x.strip() for x in found):
            raise ValueError(f"the field {self.choices!r} is no list of texts: {found!r}")
        if len(found) < 2:
            raise ValueError(f"the field {self.choices!r} has {len(found)} choices: give at least 2")
        return found

    def _right(self, record: Record) -> int:
        choices, answer = self._choices(record), record[self.answer]
        if answer in choices:
            return choices.index(answer)
        letters = string.ascii_uppercase[: len(choices)]
        number = str(letters.index(answer)) if str(answer) in [*letters] else str(answer)
        if not number.isdecimal() or int(number) >= len(choices):
            raise ValueError(f"the field {self.answer!r} is {answer!r}, none of {len(choices)} choices")
        return int(number)


@dataclasses.dataclass(frozen=True)
class Completion(Task, kind="completion"):
    """Right is who would say exactly this answer, token by token, if always the most probable one is said."""

    question: str = "{context}"
    answer: str = "{continuation}"

    metrics: ClassVar = {"accuracy": HIGHEST, "nats_per_answer": LOWEST, "bits_per_byte": LOWEST}

    def check(self, record: Record) -> None:
        filled(self.question, record)
        if not filled(self.answer, record):
            raise ValueError(f"the answer {self.answer!r} is empty")

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        question, answer = filled(self.question, item.record), filled(self.answer, item.record)
        shots = [(filled(self.question, shot), filled(self.answer, shot)) for shot in item.shots]
        return [ask.scored(question, answer, shots)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        size = len(filled(self.answer, item.record).encode())
        return {
            "accuracy": (float(answers[0].greedy and math.isfinite(answers[0].nats)), 1.0),
            "nats_per_answer": (answers[0].nats, 1.0),
            "bits_per_byte": (answers[0].nats / math.log(2), float(size)),
        }


@dataclasses.dataclass(frozen=True)
class Generation(Task, kind="generation"):
    """The model writes an answer, greedily, and a check compares it with the record's.

    check_by: one of checks.CHECKS; pattern: what the check "regex" takes the answer from (its first group).
    shown: the answer in few-shot examples, if they show more than is compared. stops: end an answer to text;
    a turn ends itself.
    """

    question: str = "{question}\nAnswer:"
    answer: str = "{answer}"
    check_by: Literal["exact", "contains", "regex", "numeric", "rules", "refusal"] = "exact"
    pattern: str = ""
    shown: str = ""
    stops: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 256

    @property
    def metrics(self) -> Mapping[str, str]:
        more = {
            "rules": dict.fromkeys(("accuracy_loose", "instructions", "instructions_loose"), HIGHEST),
            "refusal": {"refused": NEITHER},
        }
        return {"accuracy": HIGHEST, "stopped": HIGHEST} | more.get(self.check_by, {})

    def validate(self) -> None:
        check_least(self, "", max_tokens=1)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pattern is {self.pattern!r}, no regular expression: {error}") from None
        if (self.check_by == "regex") != bool(self.pattern):
            raise UserError("pattern is given with check_by=regex, and only then")

    def check(self, record: Record) -> None:
        filled(self.question, record)
        expected = self._expected(record)
        if self.check_by == "numeric" and checks.number(expected) is None:
            raise ValueError(f"the answer {expected!r} has no number")
        if not (expected if self.check_by == "rules" else checks.plain(expected)):
            raise ValueError(f"the answer {self.answer!r} is {expected!r}: nothing to compare with")

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        shown = self.shown or self.answer
        shots = [(filled(self.question, shot), filled(shown, shot)) for shot in item.shots]
        prompt = ask.prompt(filled(self.question, item.record), shots)
        return [Generate(prompt, ask.stops(self.stops), self.max_tokens, written=ask.written)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        answer = answers[0]
        found = checks.CHECKS[self.check_by](answer.text.strip(), self._expected(item.record), self.pattern)
        return found | {"stopped": (float(answer.finish == "stop"), 1.0)}

    def _expected(self, record: Record) -> checks.Expected:
        """What the check compares with: a text, or for rules their names and settings."""
        if self.check_by == "rules":
            return checks.rules_of(record)
        return filled(self.answer, record)


@dataclasses.dataclass(frozen=True)
class Documents(Task, kind="documents"):
    """Bits per byte of whole texts, each from its beginning.

    longest: only so many characters of each, at up to `windows` places that lie evenly over it.
    """

    text: str = "text"
    longest: int = 0
    windows: int = 1

    metrics: ClassVar = {"bits_per_byte": LOWEST, "nats_per_token": LOWEST}

    def check(self, record: Record) -> None:
        if not isinstance(record[self.text], str) or not record[self.text]:
            raise ValueError(f"the field {self.text!r} is no text")

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        return [Rolling(text) for text in self._texts(item)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        nats = sum(answer.nats for answer in answers)
        size = float(sum(len(text.encode()) for text in self._texts(item)))
        return {
            "bits_per_byte": (nats / math.log(2), size),
            "nats_per_token": (nats, float(sum(answer.tokens for answer in answers))),
        }

    def _texts(self, item: Item) -> list[str]:
        text = item.record[self.text]
        size = self.longest or len(text)
        count, room = max(1, min(self.windows, len(text) // size)), max(0, len(text) - size)
        starts = [room * number // max(1, count - 1) for number in range(count)]
        return [text[start : start + size] for start in starts]


@dataclasses.dataclass(frozen=True)
class OpenEnded(Task, kind="open_ended"):
    """Prompts without a right answer: how often it degenerates. Nothing but the model ends it.

    never_stops: it reaches `max_tokens`. repeats: it ends in a piece that is said four times in a row.
    continues_as_user: it goes on with a turn that isn't its own.
    """

    question: str = "{prompt}"
    max_tokens: int = 128

    metrics: ClassVar = dict.fromkeys(("degenerate", "never_stops", "repeats", "continues_as_user"), LOWEST)

    def validate(self) -> None:
        check_least(self, "", max_tokens=1)

    def check(self, record: Record) -> None:
        filled(self.question, record)

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        prompt = ask.prompt(filled(self.question, item.record))
        return [Generate(prompt, (), self.max_tokens, written=ask.written)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        found = {
            "never_stops": answers[0].finish == "length",
            "repeats": checks.repeats(answers[0].text),
            "continues_as_user": checks.continues_as_user(answers[0].text),
        }
        return {"degenerate": (float(any(found.values())), 1.0)} | {
            name: (float(value), 1.0) for name, value in found.items()
        }
