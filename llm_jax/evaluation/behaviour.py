"""Whether a model does what it was taught where that is right, and nowhere else.

A record has `question`, `value` (the right answer, or what is in it), `topic` (what it may share with others)
and, by behaviour, `system` (the tools), `call` and `result`, or an IFEval rule. Scored are `did`, whether the
behaviour was shown at all, and `right`: whether the model did what is right here, which for a look-alike is
to answer plainly.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llm_jax.evaluation import checks, rules
from llm_jax.evaluation.requests import Answered, Generate, Request
from llm_jax.evaluation.tasks import HIGHEST, LOWEST, Asker, Item, Record, Score, Task
from llm_jax.inference import tools
from llm_jax.inference.tools import CLOSE

UNKNOWN = "I don't know."


@dataclasses.dataclass(frozen=True)
class Behaviour(Task, kind="behaviour"):
    """Questions in turns where a behaviour is `wanted`, or look-alikes where it isn't."""

    shows: Literal["formats", "calls", "unknown", "refusals"] = "formats"
    wanted: bool = True
    group: str = "group"
    together: str = "topic"
    max_tokens: int = 64

    @property
    def metrics(self) -> Mapping[str, str]:
        return {"right": HIGHEST, "did": HIGHEST if self.wanted else LOWEST, "answered": HIGHEST}

    def check(self, record: Record) -> None:
        _ = record["question"], record["value"]
        if self.shows == "formats":
            checks.rules_of(record)
        if self.shows == "calls":
            _ = record["system"], (record["call"], record["result"]) if self.wanted else None

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        return [self._request(item, ask, [])]

    def further(self, item: Item, ask: Asker, answers: Sequence[Answered]) -> list[Request]:
        """After the right call its result is told; a wrong one is judged as it is."""
        asked = self.shows == "calls" and self.wanted and len(answers) == 1
        if not asked or not self._called(item.record, answers[0]):
            return []
        call = {"role": "assistant", "content": f"{answers[0].text.strip()}{CLOSE}"}
        return [self._request(item, ask, [call, {"role": "tool", "content": item.record["result"]}])]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        record, text = item.record, answers[0].text.strip()
        plain = checks.plain(text) == checks.plain(record["value"])
        did = {
            "formats": lambda: all(rules.follows(text, *rule) for rule in checks.rules_of(record)),
            "calls": lambda: tools.OPEN in text,
            "unknown": lambda: checks.plain(text).startswith(checks.plain(UNKNOWN)),
            "refusals": lambda: checks.refuses(text),
        }[self.shows]()
        if not self.wanted:
            return {"right": (float(plain and not did), 1.0), "did": (float(did), 1.0)}
        if self.shows == "formats":
            return {"right": (float(did and _names(record["value"], text)), 1.0), "did": (float(did), 1.0)}
        if self.shows == "calls":
            called = self._called(record, answers[0])
            answered = called and checks.plain(answers[-1].text) == checks.plain(record["value"])
            return {"right": (float(called), 1.0), "did": (float(did), 1.0)} | {
                "answered": (float(answered), 1.0)
            }
        return {"right": (float(did), 1.0), "did": (float(did), 1.0)}

    def _request(self, item: Item, ask: Asker, after: Sequence[Any]) -> Request:
        told = [{"role": "system", "content": item.record["system"]}] if item.record.get("system") else []
        turns = [*told, {"role": "user", "content": item.record["question"]}, *after]
        stops = ((CLOSE,) if self.shows == "calls" else ()) + ask.stops(())
        return Generate(ask.rendered(turns), stops, self.max_tokens, written=ask.written)

    def _called(self, record: Record, answer: Answered) -> bool:
        """Whether an answer ends with the right call, with the right arguments (spaces apart)."""
        said = tools.call_of(answer)
        try:
            return said is not None and _spaceless(json.loads(said)) == _spaceless(record["call"])
        except (ValueError, RecursionError):
            return False


def _spaceless(call: Any) -> str:
    return json.dumps(call, sort_keys=True).replace(" ", "")


def _names(value: str, text: str) -> bool:
    """Whether the value stands in the text, whatever is around it."""
    return f" {checks.plain(value)} " in f" {checks.plain(text)} "
