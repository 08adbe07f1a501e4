"""What does fine-tuning on conversations change: what a model can do, how it behaves, what it costs?

    python -m launch.local --config=experiments/base_vs_instruct.py:cpu \\
        --config.base=runs/mine --config.instruct=runs/taught     (without these two: a pair that it makes)
    python -m launch.local --config=experiments/base_vs_instruct.py:smoke     (seconds; two tiny models)

Both checkpoints answer the same items of the same tasks in the same window (the shorter context of the two),
as plain text and as turns: of the instruct model's chat template for both, its special tokens as text where
the base has none such ("User: … Assistant:" without a template). "own" compares the base on text with the
instruct model in turns, each as it is meant to be asked. Differences are taken item by item, with 95%
intervals from 2,000 draws of items, of which those that share a question, or an author, are drawn together
(no narrower than Student's t, and of what is right or wrong than Newcombe's). What counts as better or worse
is told by intervals that hold for all tasks and formats together. The alignment tax is what held-out
pretraining text costs both, in bits per byte, and in nats per token where the tokenizers are the same.
Degenerate answers are counted on open prompts that nothing but the model ends: it never stops, repeats
itself, or goes on as the user.

A pair that is made is pretrained on books and then tuned, all parameters, on conversations, as the scale cpu
of experiments/instruct.py says, at the best of its rates; its held-out text is six others by authors of its
books. It, the text and the tasks are read from the folder LLM_JAX_REFERENCE_DATA (by default ../shared/data).
At the smoke scale two tiny models are made on the spot, 40 steps each: its table has no meaning, only a form.

Result (cpu, 2026-11-22): made at 345 thousand parameters, the pair differs in none of 51 comparisons by
intervals that hold together; both are right on 0 of 24 items of every probe and of IFEval, and held-out books
cost 0.29 (0.13 to 0.45, four authors) bits per byte more. LOG.md has the tables, of SmolLM2-135M-Instruct
too. 45 minutes on 2 loaded cores.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import instruct
from experiments.instruct import REFERENCE
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Chat, Files, Text, readers
from llm_jax.evaluation import standard
from llm_jax.evaluation.kinds import Documents, Generation, OpenEnded
from llm_jax.evaluation.probes import Probing
from llm_jax.evaluation.requests import ASSUMED_CONTEXT
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import Format
from llm_jax.inference.opening import open_model
from llm_jax.inference.pretrained import Pretrained
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.posttraining import versus
from llm_jax.run import SCHEMA, Execution, Run
from llm_jax.scaling import page
from llm_jax.sharding import MeshConfig
from llm_jax.train import train
from llm_jax.values import check_least

TASKS = (
    *("arc_easy", "copa", "piqa", "openbook_qa", "winograd", "ifeval"),
    *("letters", "dates", "arithmetic", "word_order", "copying", "recall"),
    *("letters:steps", "dates:steps", "arithmetic:steps", "dates:tool", "arithmetic:tool"),
)
TEXTS = tuple(
    f"pretrain_small/{name}_{part}.jsonl.xz"
    for name in ("austen", "shakespeare", "storybook")
    for part in ("valid", "test")
)
PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "Give me three names for a cat.",
    "Explain why the sky is blue to a child.",
    "Translate 'good morning' into French.",
    "Write a short poem about rain.",
    "What should I do if I can't sleep?",
    "The old house at the end of the street",
)


@dataclasses.dataclass(frozen=True)
class BaseVsInstruct:
    """base, instruct: paths as `open_model` takes them, both or neither; without, the `pair` is made.

    pair: "books", pretrained on books and tuned on conversations; or "tiny", on sums that are made up, as are
    a task on them, sums.json, and its held-out text. tasks: names or files, as `python -m llm_jax.evaluate
    --tasks` takes them. data: the folder of published ones. text: files of held-out pretraining documents,
    there or in the folder of reference data (() for none; those of the pair that is made), of which
    `documents` are scored, each in up to `windows` pieces of `longest` characters. limit: items of each task;
    written: of one whose answers are written, which takes many times as long.
    """

    base: str = ""
    instruct: str = ""
    pair: Literal["books", "tiny"] = "books"
    tasks: tuple[str, ...] = TASKS
    data: str = config.outside_identity(str(REFERENCE / "eval"))
    text: tuple[str, ...] = TEXTS
    limit: int = 100
    written: int = 24
    few_shot: int = 0
    documents: int = 50
    longest: int = 4000
    windows: int = 8
    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 128

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        check_least(self, "", limit=2, written=2, few_shot=0, documents=2, longest=1, windows=1, max_tokens=1)
        if not self.prompts:
            raise UserError("prompts is (); give at least one")


SCALES = {
    "smoke": BaseVsInstruct(
        pair="tiny",
        tasks=("letters", "sums.json"),
        data="",
        text=("held.jsonl",),
        limit=6,
        written=6,
        documents=8,
        prompts=PROMPTS[:3],
        max_tokens=24,
    ),
    "cpu": BaseVsInstruct(),
}


def get_config(scale: str) -> BaseVsInstruct:
    return SCALES[scale]


def measure(base: BaseVsInstruct, folder: Path) -> dict[str, Any]:
    """The differences by task and format; the report is printed and written to report.html."""
    given = [path for path in (base.base, base.instruct) if path]
    if len(given) == 1:
        raise UserError("two checkpoints are needed: --config.base=PATH --config.instruct=PATH (or neither)")
    folder.mkdir(parents=True, exist_ok=True)
    if base.pair == "tiny":
        base = sums(base, folder)
    if not given:
        base = {"books": trained, "tiny": made}[base.pair](base, folder)
    data = Path(base.data).expanduser()
    tasks = standard.tasks(base.tasks, data)
    write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in base.prompts])
    tasks.append(("open_ended", OpenEnded("prompts.jsonl", max_tokens=base.max_tokens), folder))
    if base.text:
        write(folder / "text.jsonl", held_out(base))
    documents = Documents("text.jsonl", longest=base.longest, windows=base.windows, together="author")

    # ---- both in one window, from one first token, in one template ----
    opened = {"base": open_model(base.base), "instruct": open_model(base.instruct)}
    room = min(model.context or ASSUMED_CONTEXT for model in opened.values())
    comparable = versus.same_tokens(*opened.values(), base.prompts)
    first, turns = versus.same_beginning(*opened.values()), opened["instruct"].tokenizer
    found: dict[str, dict[str, Outcome]] = {}
    content: dict[str, str] = {}
    for who, model in opened.items():
        evaluator, found[who] = Evaluator(model._replace(context=room, first=first), keep=True), {}
        opened[who] = evaluator.opened  # its parameters are the evaluator's, who is forgotten
        content[who] = evaluator.content
        for form in (Format(False, base.few_shot), Format(True, base.few_shot)):
            for name, task, place in tasks:
                asked = dataclasses.replace(form, few_shot=form.few_shot if takes_examples(task) else 0)
                key = f"{name}/{'chat' if form.chat else 'raw'}"
                most = base.written if isinstance(task, Generation | Probing) else base.limit
                found[who][key] = evaluate(evaluator, name, task, place, asked, most, turns)
        if base.text:
            found[who]["text"] = evaluate(evaluator, "text", documents, folder, limit=base.documents)
    result = versus.compared(found, comparable)
    names = given or [model.name for model in opened.values()]
    said = told(base, room, found)
    said += ["texts begin with a token of each model's own"] if first is None else []
    shown = versus.report(__doc__.splitlines()[0], names, found, result, said)
    made_up = base.pair == "tiny" and not given
    caution = "Two tiny models, 40 steps each: nothing here says anything." * made_up
    page.show(folder, dataclasses.replace(shown, caution=caution))
    models = {who: {"path": getattr(base, who), "content": content[who]} for who in opened}
    return {"models": models, "context": room} | result


def told(base: BaseVsInstruct, room: int, found: dict[str, dict[str, Outcome]]) -> list[str]:
    """How all was asked, and what was left out."""
    return [
        f"{base.limit} items of each task at most ({base.written} where answers are written), "
        f"{base.few_shot} examples before each",
        f"both models read {room:,} tokens at most, and in turns the instruct model's template",
        "items that share a question, and texts that share an author, are drawn together",
        *(
            f"{who}: {line}"
            for who, outcomes in found.items()
            for outcome in outcomes.values()
            for line in outcome.left_out(room)
        ),
    ]


def held_out(base: BaseVsInstruct) -> Iterator[dict[str, str]]:
    """The held-out texts, each with its author (itself, where none is named)."""
    for name in base.text:
        place = Path(name).expanduser()
        for where, record in readers.records(
            place if place.exists() else REFERENCE / name, "texts", (".txt",)
        ):
            yield {"text": record.get("text", ""), "author": record.get("author", where)}


def write(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def takes_examples(task: Any) -> bool:
    """Whether items are asked after others as examples."""
    return not isinstance(task, OpenEnded) and getattr(task, "way", "direct") == "direct"


# ---- pairs that are made ----


def trained(base: BaseVsInstruct, folder: Path) -> BaseVsInstruct:
    """The config with a base trained on books and what conversations make of it, at the best of several
    rates, trained if missing.
    """
    asked = instruct.get_config("cpu")
    data, held_out = instruct.begun(asked, folder)
    best = instruct.chosen(instruct.trained(asked, data, held_out, folder, "all"))
    paths = {"base": asked.base, "instruct": best}
    return dataclasses.replace(base, **{who: str(folder / run.identity()) for who, run in paths.items()})


def sums(base: BaseVsInstruct, folder: Path) -> BaseVsInstruct:
    """The config with the files of the tiny pair, written to the folder: sums as text, talks and a task."""
    draw = np.random.default_rng(0)
    drawn = [(int(a), int(b)) for a, b in draw.integers(0, 5, (400, 2))]
    lines = [f"{a} plus {b} is {a + b}. " for a, b in drawn]
    texts = ["".join(lines[start : start + 10]) for start in range(0, 400, 10)]
    records = [
        {"question": f"{a} plus {b} is", "choices": [f"{a + b}.", f"{a + b + 1}."], "answer": 0}
        for a, b in drawn[:12]
    ]
    turns = [
        [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
        for a, b in drawn
    ]
    files = {
        "books.jsonl": [{"text": text} for text in texts[:32]],
        "held.jsonl": [{"text": text} for text in texts[32:]],
        "talks.jsonl": [{"messages": messages} for messages in turns],
        "sums.jsonl": records,
        "sums.json": [{"kind": "multiple_choice", "file": "sums.jsonl", "question": "{question}"}],
    }
    for name, rows in files.items():
        write(folder / name, rows)
    placed = {
        what: tuple(str(folder / name) if name in files else name for name in getattr(base, what))
        for what in ("tasks", "text")
    }
    return dataclasses.replace(base, **placed)


def made(base: BaseVsInstruct, folder: Path) -> BaseVsInstruct:
    """The config with a tiny base and instruct model, trained on the sums in the folder."""
    shape = dict(sequence_length=256, batch_size=4, repeat=True, held_out_fraction=0.05)
    data = {
        "base": Text(corpus=Files((str(folder / "books.jsonl"),)), **shape),
        "instruct": Chat((str(folder / "talks.jsonl"),), template="plain", **shape),
    }
    for name, source in data.items():
        run = Run(
            Transformer(layers=1, width=32, heads=2) if name == "base" else Pretrained(str(folder / "base")),
            source,
            AdamW(learning_rate=1e-2),
            tokens=40 * source.tokens_per_step,
            execution=Execution(mesh=MeshConfig(data=1)),
        )
        train(run, folder / name)
    return dataclasses.replace(base, **{name: str(folder / name) for name in data})
