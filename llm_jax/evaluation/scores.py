"""What a model's answers to a task are worth: metrics with standard errors, and every item's own scores."""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.evaluation.requests import ASSUMED_CONTEXT, Answered, fits
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.tasks import Asker, Format, Item, Score, Task
from llm_jax.interop.tokenizer import Portable


class Metric(NamedTuple):
    """A ratio of sums over `count` items with its standard error (nan for one alone, or one group)."""

    value: float
    standard_error: float
    count: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A task in a format: its items, what the model answered, and each item's scores by metric.

    skipped: items of which nothing can be said, those included that weren't asked (no answers), since what is
    to be scored is longer than the context. cut: prompts that the context was too short for.
    """

    name: str
    task: Task
    form: Format
    items: Sequence[Item]
    answers: Sequence[Sequence[Answered]]
    scores: Sequence[Mapping[str, Score]]

    @property
    def skipped(self) -> int:
        return sum(not one for one in self.scores)

    @property
    def cut(self) -> int:
        return sum(any(answer.cut for answer in answers) for answers in self.answers)

    @property
    def shared(self) -> list[Hashable]:
        """What each item shares with others, if it does, so that they are no independent draws."""
        name = self.task.together
        return [str(item.record[name]) if name else number for number, item in enumerate(self.items)]

    def left_out(self, context: int | None) -> list[str]:
        """In words, what of it was left out and what cut; context: of the model in tokens."""
        room, too_long = f"the context of {context or ASSUMED_CONTEXT:,} tokens", self.answers.count([])
        told = {
            "items can't be judged here and are left out": self.skipped - too_long,
            f"items are left out, an answer of which is longer than {room}": too_long,
            f"prompts were cut to {room}": self.cut,
        }
        return [f"{self.name}, {self.form}: {count:,} {what}" for what, count in told.items() if count]

    def metrics(self) -> dict[str, Metric]:
        """All metrics, by name; of a task with groups also `metric/GROUP` of the one that stands for it."""
        columns, shared = collections.defaultdict(list), collections.defaultdict(list)
        for item, scores, group in zip(self.items, self.scores, self.shared, strict=True):
            for name, score in scores.items():
                of = f"{name}/{item.record[self.task.group]}" if self.task.group else name
                for column in {name, of}:
                    columns[column].append(score)
                    shared[column].append(group)
        first = [name for name in columns if "/" not in name]
        grouped = [name for name in columns if name.startswith(f"{next(iter(first), '')}/")]
        return {name: metric(columns[name], shared[name]) for name in (*first, *grouped)}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": {"chat": self.form.chat, "few_shot": self.form.few_shot},
            "kind": self.task.kind,
            "items": len(self.items),
            "skipped": self.skipped,
            "cut": self.cut,
            "metrics": {name: one._asdict() for name, one in self.metrics().items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every item: where it stands, its scores, what the model answered."""
        return [
            {"item": item.place.rpartition("/")[2], "scores": scores, "answers": [list(a) for a in answers]}
            for item, scores, answers in zip(self.items, self.scores, self.answers, strict=True)
        ]


def metric(scores: Sequence[Score], groups: Sequence[Hashable] | None = None) -> Metric:
    """The ratio of sums, with its standard error over independent items, or groups of them."""
    sums = together(np.array(scores, np.float64), groups)
    value, units = sums[:, 0].sum() / sums[:, 1].sum(), len(sums)
    error = math.sqrt(np.square(pulls(sums)).sum() * units / (units - 1)) if units > 1 else math.nan
    return Metric(float(value), error, len(scores))


def together(scores: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Scores [items, …] summed over items of the same group [units, …], in the order of the first of each."""
    if groups is None:
        return scores
    numbers: dict[Hashable, int] = {}
    at = [numbers.setdefault(group, len(numbers)) for group in groups]
    sums = np.zeros((len(numbers), *scores.shape[1:]))
    np.add.at(sums, at, scores)
    return sums


def pulls(sums: np.ndarray) -> np.ndarray:
    """By how much each unit of [units, (sum, count)] moves their ratio, by linearisation (Cochran, Sampling
    Techniques, 3rd edition, equation 2.45); their squares add up to its variance.
    """
    total, count = sums.sum(0)
    return (sums[:, 0] - total / count * sums[:, 1]) / count


def evaluate(
    evaluator: Evaluator,
    name: str,
    task: Task,
    folder: pathlib.Path,
    form: Format = Format(),
    limit: int | None = None,
    turns: Portable | None = None,
) -> Outcome:
    """Asks a model about all items of a task, or a fair sample of `limit`.

    turns: whose chat template writes them, if that isn't the model's own.
    """
    own = evaluator.opened.tokenizer
    ask, task = Asker(form, turns or own, turns not in (None, own)), task.about(evaluator.opened)
    items, what = task.items(folder, form.few_shot, limit), f"{name}, {form}"
    asked = [task.requests(item, ask) for item in items]
    asked = [one if all(fits(request, evaluator.opened) for request in one) else [] for one in asked]
    given: list[list[Answered]] = [[] for _ in items]
    while any(asked):
        answers = iter(evaluator.run([request for requests in asked for request in requests], what))
        for requests, answered in zip(asked, given, strict=True):
            answered += itertools.islice(answers, len(requests))
        asked = [
            task.further(item, ask, answered) if requests else []
            for item, requests, answered in zip(items, asked, given, strict=True)
        ]
    scores = [task.scores(*one) if one[1] else {} for one in zip(items, given, strict=True)]
    return Outcome(name, task, form, items, given, scores)
