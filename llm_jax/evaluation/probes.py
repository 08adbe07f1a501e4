"""Probes: questions made by code, with answers computed by code, at growing sizes.

    python -m llm_jax.evaluate --model=… --tasks=letters,dates,arithmetic,letters:steps --chat

Each is asked directly, to "think step by step" (NAME:steps), or with tools to call (NAME:tool, where one
would help), and scored by size.
"""

import collections
import dataclasses
import datetime
import functools
import itertools
import pathlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from llm_jax.config import UserError, nearest
from llm_jax.data.templates import Message
from llm_jax.evaluation import checks
from llm_jax.evaluation.requests import Answered, Generate, Request
from llm_jax.evaluation.tasks import HIGHEST, NEITHER, Asker, Item, Score, Task
from llm_jax.inference import tools
from llm_jax.inference.opening import Opened
from llm_jax.values import check_least

WORDS = re.findall(
    r"\w+",
    """apple river candle winter basket yellow monkey garden bottle silver letter hammer strawberry balloon
    blueberry committee bookkeeper mississippi parallel coffee tomorrow necessary raspberry umbrella elephant
    banana pepper assassin address tennessee successful bee tree moon egg book wall kiss noon sheep queen""",
)
PEOPLE = re.findall(r"\w+", "dog man cat girl boy horse king farmer teacher singer sailor baker")
VERBS = {"bites": "bitten", "chases": "chased", "sees": "seen", "helps": "helped", "pushes": "pushed"}
NAMES = re.findall(
    r"\w+", "Anna Ben Clara David Emma Felix Greta Henry Ida Jonas Karla Louis Maria Nils Olga"
)
FILLER = [
    "The weather stayed the same for the rest of that week.",
    "A train went by, and nobody looked up from the table.",
    "Someone had left the window of the kitchen open again.",
    "There was little to do but to wait for the evening.",
    "The road to the village is long, and it has few trees.",
]

Pair = tuple[str, str]  # a question and its answer


class Probe(NamedTuple):
    """make(random, size) -> questions with answers, all of which one item asks. sizes: small to large.

    unit: what the size counts. wanted: what an answer is to be. tools: that would help. tokens: of an answer,
    given the size.
    """

    make: Callable[[random.Random, int], list[Pair]]
    sizes: tuple[int, ...]
    unit: str
    wanted: str
    check: str
    tools: tuple[str, ...] = ()
    tokens: Callable[[int], int] = lambda size: 24


def letters(draw: random.Random, size: int) -> list[Pair]:
    """How many r's in strawberry? size: the least letters of the word."""
    word = draw.choice([word for word in WORDS if len(word) >= size and (len(word) < size + 3 or size == 9)])
    letter = draw.choice(word)
    return [
        (f'How many times does the letter "{letter}" stand in the word "{word}"?', str(word.count(letter)))
    ]


def dates(draw: random.Random, size: int) -> list[Pair]:
    """When is the next Wednesday, and what day is it in so many days? size: the most days ahead."""
    today = datetime.date(2001, 1, 1) + datetime.timedelta(draw.randrange(365 * 30))
    said = f"Today is {today:%A}, {today.day} {today:%B %Y}."
    later = today + datetime.timedelta(draw.randint(1, size))
    if size <= 7:
        return [(f"{said} What is the date of the first {later:%A} after today?", later.isoformat())]
    return [(f"{said} What is the date in {(later - today).days} days?", later.isoformat())]


def arithmetic(draw: random.Random, size: int) -> list[Pair]:
    """Sums, differences and products of two numbers of `size` digits."""
    a, b = (draw.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    sign, value = draw.choice([("+", a + b), ("-", a - b), ("*", a * b)])
    return [(f"What is {a} {sign} {b}?", str(value))]


def word_order(draw: random.Random, size: int) -> list[Pair]:
    """The dog bites the man against the man bites the dog: the same words, in one of `size` sentences."""
    people, verbs = draw.sample(PEOPLE, 2 * size), draw.sample(list(VERBS), size)
    roles, asked = list(zip(people[::2], people[1::2], strict=True)), draw.randrange(size)
    pairs = []
    for _ in range(2):
        text = " ".join(
            f"The {who} {verb} the {whom}." for (who, whom), verb in zip(roles, verbs, strict=True)
        )
        pairs.append((f"{text} Who is {VERBS[verbs[asked]]}?", roles[asked][1]))
        roles[asked] = roles[asked][::-1]
    return pairs


def copying(draw: random.Random, size: int) -> list[Pair]:
    """`size` words to be said again."""
    text = " ".join(draw.choice(WORDS) for _ in range(size))
    return [(f"Repeat these words exactly as they stand: {text}", text)]


def recall(draw: random.Random, size: int) -> list[Pair]:
    """Somebody's number, said among other people's, with `size` sentences in between."""
    people, codes = draw.sample(NAMES, 4), draw.sample(range(1000, 10000), 4)
    told = [f"The code of {name} is {code}." for name, code in zip(people, codes, strict=True)]
    between = [draw.choice(FILLER) for _ in range(size)]
    chosen = draw.randrange(4)
    text = " ".join([*told, *between])
    return [(f"{text} What is the code of {people[chosen]}?", str(codes[chosen]))]


PROBES = {
    "letters": Probe(letters, (3, 6, 9), "letters", "the number", "numeric", ("python",)),
    "dates": Probe(dates, (7, 31, 365), "days", "the date as YYYY-MM-DD", "contains", ("calendar",)),
    "arithmetic": Probe(arithmetic, (1, 2, 4, 8), "digits", "the number", "numeric", ("calculator",)),
    "word_order": Probe(word_order, (1, 2, 4), "sentences", "one word", "contains"),
    "copying": Probe(copying, (4, 16, 48), "words", "the words", "exact", (), lambda size: 8 + 6 * size),
    "recall": Probe(recall, (0, 8, 32), "sentences", "the number", "numeric"),
}
SELF = "self_knowledge"  # its answers are facts of the model that is asked
_ASKED = {
    "layers": "How many layers does the neural network that you are have?",
    "vocabulary": "How many different tokens are in your own vocabulary?",
    "context": "How many tokens fit into your own context window?",
    "width": "How many dimensions do the hidden states of your own network have?",
    "heads": "How many attention heads does each of your own layers have?",
}


@dataclasses.dataclass(frozen=True)
class Probing(Task, kind="probe"):
    """`count` items of a probe at each of its sizes; way: how they are asked. facts: the model's own.

    commonest: what is right by always giving the answer that is the most common one at a size. A question
    that is made twice is one draw.
    """

    name: str = "letters"
    way: Literal["direct", "steps", "tool"] = "direct"
    count: int = 32
    seed: int = 0
    facts: tuple[tuple[str, int], ...] = ()
    group: str = "size"
    together: str = "pairs"

    metrics: ClassVar = {
        "accuracy": HIGHEST,
        "both_orders": HIGHEST,
        "called": NEITHER,
        "commonest": NEITHER,
    }

    def validate(self) -> None:
        check_least(self, "", count=1)
        if self.name not in (*PROBES, SELF):
            raise UserError(f"no probe {self.name!r}; {nearest(self.name, (*PROBES, SELF))}")
        typed = f"{self.name}:{self.way}"
        if self.way != "direct" and typed not in ways(self.name):
            raise UserError(f"no way {self.way!r} of asking {self.name}; {nearest(typed, ways(self.name))}")
        for name in filter(None, (self.group, self.together)):
            if name not in ("size", "pairs"):
                raise UserError(f"items of a probe are told apart by size or pairs, not by {name!r}")
        if self.way == "tool":
            tools.toolbox(self.probe.tools)  # refuses where a sandbox isn't there

    def about(self, opened: Opened) -> "Probing":
        if self.name != SELF:
            return self
        known = {name: getattr(opened.config, name, None) for name in _ASKED} | {"context": opened.context}
        return dataclasses.replace(
            self, facts=tuple((name, value) for name, value in known.items() if value is not None)
        )

    @property
    def probe(self) -> Probe:
        if self.name == SELF:
            return Probe(lambda draw, size: [], (1,), "facts", "the number", "numeric")
        return PROBES[self.name]

    def items(self, folder: pathlib.Path, few_shot: int = 0, limit: int | None = None) -> list[Item]:
        """They are made, the same for the same seed; `limit` takes them evenly from all sizes."""
        if few_shot and self.way != "direct":
            raise UserError(f"{self.name}:{self.way} has no worked examples: ask it with --few_shot=0")
        if self.name == SELF:
            made = [{"pairs": [(_ASKED[name], str(value))], "size": name} for name, value in self.facts]
        else:
            made = [
                {"pairs": self.probe.make(random.Random(f"{self.name} {self.seed} {size} {number}"), size)}
                | {"size": size}
                for number in range(self.count)
                for size in self.probe.sizes
            ]
        shots = [
            {"pairs": self.probe.make(random.Random(f"{self.name} example {number}"), size)}
            for number, size in enumerate((self.probe.sizes * few_shot)[:few_shot])
        ]
        return [
            Item(f"{self.name} {i}", record, tuple(shots))
            for i, record in enumerate(_with_commonest(made[:limit]))
        ]

    def requests(self, item: Item, ask: Asker) -> list[Request]:
        stops = ask.stops(("\n",) if self.way == "direct" else ("\n\n", "Question:"))
        stops = (tools.CLOSE, *stops) if self.way == "tool" else stops
        size = item.record["size"]
        tokens = self.probe.tokens(size if isinstance(size, int) else 1) if self.way == "direct" else 256
        shots = [
            (self._asked(question, ask), answer) for shot in item.shots for question, answer in shot["pairs"]
        ]
        return [
            Generate(ask.prompt(self._asked(question, ask), shots), stops, tokens, written=ask.written)
            for question, _ in item.record["pairs"]
        ]

    def further(self, item: Item, ask: Asker, answers: Sequence[Answered]) -> list[Request]:
        """After a call of a tool, the prompt with it and its result."""
        if self.way != "tool" or len(answers) > tools.MOST_CALLS or tools.call_of(answers[-1]) is None:
            return []
        question = self._asked(item.record["pairs"][0][0], ask)
        turns = [turn for answer in answers for turn in _heard(answer, self.probe.tools)]
        stops = (tools.CLOSE, *ask.stops(("\n\n", "Question:")))
        return [Generate(ask.after_tools(question, turns), stops, 256, written=ask.written)]

    def scores(self, item: Item, answers: Sequence[Answered]) -> dict[str, Score]:
        wanted = [answer for _, answer in item.record["pairs"]]
        if self.way == "tool":
            right = [self._right(answers[-1].text, wanted[0])]
            more = {"called": (float(tools.call_of(answers[0]) is not None), 1.0)}
        else:
            right = [self._right(answer.text, one) for one, answer in zip(wanted, answers, strict=True)]
            more = {"both_orders": (float(all(right)), 1.0)} if len(right) > 1 else {}
        if "commonest" in item.record:
            more["commonest"] = (float(wanted.count(item.record["commonest"])), float(len(wanted)))
        return {"accuracy": (float(sum(right)), float(len(right)))} | more

    def _asked(self, question: str, ask: Asker) -> str:
        how = {
            "direct": f"Answer with {self.probe.wanted} only.",
            "steps": f'Think step by step, then write "Answer:" and {self.probe.wanted}.',
            "tool": f"{self._told()}\nUse a tool, then answer with {self.probe.wanted} only.",
        }[self.way]
        text = f"{question} {how}"
        return text if ask.form.chat else f"Question: {text}\n" + "Answer:" * (self.way == "direct")

    def _told(self) -> str:
        return tools.described(tools.toolbox(self.probe.tools)) if self.way == "tool" else ""

    def _right(self, text: str, wanted: str) -> bool:
        """Judged is what stands behind the last "Answer:", if that is there, and in no call."""
        said = tools.without_calls(text).rpartition("Answer:")[2].strip()
        if self.name == "word_order":  # the first of the people that it names
            named = [word for word in checks.plain(said).split() if word in PEOPLE]
            return named[:1] == [wanted]
        return checks.CHECKS[self.probe.check](said, wanted, "")["accuracy"][0] == 1.0


def _with_commonest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each record with the answer that is the most common one at its size, where there are several items."""
    answers = collections.defaultdict(list)
    for record in records:
        answers[record["size"]].append([answer for _, answer in record["pairs"]])
    commonest = {
        size: collections.Counter(itertools.chain(*of)).most_common(1)[0][0]
        for size, of in answers.items()
        if len(of) > 1
    }
    return [
        record | ({"commonest": commonest[record["size"]]} if record["size"] in commonest else {})
        for record in records
    ]


@functools.lru_cache(maxsize=1 << 14)
def _heard(answer: Answered, names: tuple[str, ...]) -> list[Message]:
    """The turns of an answer; what it calls is run once, however many answers follow."""
    return tools.heard(answer, tools.toolbox(names))


def ways(name: str) -> list[str]:
    """How the probe NAME can be asked, as it is typed."""
    helped = name in PROBES and PROBES[name].tools
    return [name, f"{name}:steps", *[f"{name}:tool"] * bool(helped)]


def find(name: str) -> Probing | None:
    """The probe that NAME or NAME:way names; None where it names none."""
    head, _, way = name.partition(":")
    if head not in (*PROBES, SELF):
        return None
    found = Probing(name=head, way=way or "direct")
    found.validate()
    return found
