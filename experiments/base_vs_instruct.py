"""What does fine-tuning on conversations change: what a model can do, how it behaves, what it costs?

    python -m launch.local --config=experiments/base_vs_instruct.py:cpu \\
        --config.base=runs/mine --config.instruct=runs/taught     (without these two: a pair that it makes)
    python -m launch.local --config=experiments/base_vs_instruct.py:smoke     (seconds; two tiny models)

Both checkpoints answer the same items of the same tasks, as plain text and as turns (each by its own chat
template; one without any in a transcript, "User: … Assistant:"). Differences are taken item by item, with
95% intervals from 2,000 draws of items (of what is right or wrong no narrower than Newcombe's); "own"
compares the base on text with the instruct model in turns, each as it is meant to be asked. The alignment
tax is what held-out pretraining text costs both, in bits per byte, and in nats per token where the
tokenizers are the same. Degenerate answers are counted on open prompts that nothing but the model ends: it
never stops, repeats itself, or goes on as the user.

A pair that is made is pretrained on books and then tuned, all parameters, on conversations, as the scale cpu
of experiments/instruct.py says; it and the tasks are read from the folder LLM_JAX_REFERENCE_DATA (by default
../shared/data). At the smoke scale two tiny models are made on the spot, 40 steps each: its table has no
meaning, only a form.

Made at 345 thousand parameters, the pair differs on none of five tasks of 100 items beyond the 95% interval,
and both answer none of 24 items of any probe; books cost 0.043 (0.036 to 0.050) bits per byte more. About 10
minutes on 2 loaded cores without the probes. Turns were scored at a boundary that has moved since (LOG.md).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments import instruct
from experiments.instruct import REFERENCE
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Chat, Files, Text
from llm_jax.evaluation import standard
from llm_jax.evaluation.compare import Difference, paired
from llm_jax.evaluation.kinds import Documents, OpenEnded
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import HIGHEST, Format
from llm_jax.inference.opening import Opened, open_model
from llm_jax.inference.pretrained import Pretrained, PretrainedTokenizer
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import SCHEMA, Execution, Run
from llm_jax.scaling import page, style
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile
from llm_jax.sharding import MeshConfig
from llm_jax.train import train
from llm_jax.values import check_least

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
    """base, instruct: paths as `open_model` takes them; "" for a pair that is made, "tiny" for a tiny one.

    tasks: names or files, as `python -m llm_jax.evaluate --tasks` takes them. data: the folder of published
    ones. text: a file of held-out pretraining documents, there or in the folder of reference data ("" for
    none), of which `documents` are scored, each up to `longest` characters. limit: items of each task.
    """

    base: str = ""
    instruct: str = ""
    tasks: tuple[str, ...] = ("arc_easy", "copa", "piqa", "openbook_qa", "winograd", "letters", "word_order")
    data: str = config.outside_identity(str(REFERENCE / "eval"))
    text: str = "pretrain/books_valid.jsonl.xz"
    limit: int = 100
    few_shot: int = 0
    documents: int = 50
    longest: int = 4000
    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 128

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        check_least(self, "", limit=2, few_shot=0, documents=2, longest=1, max_tokens=1)
        if not self.prompts:
            raise UserError("prompts is (); give at least one")


SCALES = {
    "smoke": BaseVsInstruct(
        "tiny",
        "tiny",
        ("letters", "sums.json"),
        "",
        "",
        limit=6,
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
    paths = (base.base, base.instruct)
    made_here = "tiny" in paths
    if made_here:
        base = made(base, folder)
    elif paths == ("", ""):
        base = trained(base, folder)
    elif "" in paths:
        raise UserError("two checkpoints are needed: --config.base=PATH --config.instruct=PATH (or neither)")
    data = Path(base.data).expanduser()
    tasks = [standard.find(name, data) for name in base.tasks]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in base.prompts))
    tasks.append(("open_ended", OpenEnded("prompts.jsonl", max_tokens=base.max_tokens), folder))
    documents = None
    if base.text:
        place = Path(base.text).expanduser()
        place = place if place.exists() else REFERENCE / base.text
        documents = Documents(place.name, longest=base.longest), place.parent
    found: dict[str, dict[str, Outcome]] = {}
    opened = {"base": open_model(base.base), "instruct": open_model(base.instruct)}
    comparable = same_tokens(*opened.values(), base.prompts)
    for who, model in opened.items():
        evaluator, found[who] = Evaluator(model, keep=True), {}
        opened[who] = evaluator.opened  # its parameters are the evaluator's, who is forgotten
        for form in (Format(False, base.few_shot), Format(True, base.few_shot)):
            for name, task, place in tasks:
                asked = dataclasses.replace(form, few_shot=form.few_shot if takes_examples(task) else 0)
                key = f"{name}/{'chat' if form.chat else 'raw'}"
                found[who][key] = evaluate(evaluator, name, task, place, asked, base.limit)
        if documents:
            task, place = documents
            found[who]["text"] = evaluate(evaluator, "text", task, place, limit=base.documents)
    result = compared(found, comparable)
    page.show(folder, report(base, opened, found, result, made_here))
    return result


def takes_examples(task: Any) -> bool:
    """Whether items are asked after others as examples."""
    return not isinstance(task, OpenEnded) and getattr(task, "way", "direct") == "direct"


def same_tokens(one: Opened, other: Opened, texts: tuple[str, ...]) -> bool:
    """Whether both read a text as the same tokens, so that losses a token can be compared."""
    return all(np.array_equal(one.encode(text), other.encode(text)) for text in texts)


def compared(found: dict[str, dict[str, Outcome]], comparable: bool) -> dict[str, Any]:
    """{"tasks": {"NAME/FORMAT": {base, instruct, difference, low, high, ...}}, "degenerate", "text",
    "left_out": {MODEL: {"NAME/FORMAT": {cut, skipped}}}, ...}
    """
    tasks, degenerate = {}, {}
    own = [name.removesuffix("/raw") for name in found["base"] if name.endswith("/raw")]
    keys = [(name, name, name) for name in found["base"] if name != "text"]
    keys += [(f"{name}/own", f"{name}/raw", f"{name}/chat") for name in own]
    for key, of_base, of_instruct in sorted(keys):
        metrics = paired(found["base"][of_base], found["instruct"][of_instruct])
        if key.startswith("open_ended/"):
            degenerate[key.partition("/")[2]] = {name: told(one) for name, one in metrics.items()}
            continue
        name, one = next(iter(metrics.items()))
        others = {other: told(pair) for other, pair in metrics.items()}
        best = found["base"][of_base].task.metrics[name]
        tasks[key] = told(one) | {"metric": name, "best": best, "metrics": others}
    text = {}
    if "text" in found["base"]:
        metrics = paired(found["base"]["text"], found["instruct"]["text"])
        kept = [name for name in metrics if comparable or name != "nats_per_token"]
        text = {name: told(metrics[name]) for name in kept}
    left_out = {
        who: {key: {"cut": one.cut, "skipped": one.skipped} for key, one in outcomes.items()}
        for who, outcomes in found.items()
    }
    return {
        "tasks": tasks,
        "degenerate": degenerate,
        "text": text,
        "same_tokenizer": comparable,
        "left_out": left_out,
    }


def told(one: Difference) -> dict[str, Any]:
    return one.named("base", "instruct")


def gain(one: dict[str, Any]) -> tuple[float, float]:
    """The interval of what instruct gains: of a loss, by how much it is lower."""
    return (one["low"], one["high"]) if one["best"] == HIGHEST else (-one["high"], -one["low"])


# ---- what is shown ----


def report(
    base: BaseVsInstruct,
    opened: dict[str, Opened],
    found: dict[str, dict[str, Outcome]],
    result: dict[str, Any],
    made_here: bool,
) -> Page:
    tasks = result["tasks"]
    better = [key for key, one in tasks.items() if gain(one)[0] > 0]
    worse = [key for key, one in tasks.items() if gain(one)[1] < 0]
    own = [one["difference"] for key, one in tasks.items() if key.endswith("/own") and one["best"] == HIGHEST]
    tiles = []
    if own:  # losses are in units of their own
        meant = f"{len(own)} tasks, each model as it is meant to be asked"
        tiles.append(Tile(f"{np.mean(own):+.3f}", "mean difference", meant))
    if tax := result["text"].get("bits_per_byte"):
        tiles.append(Tile(f"{tax['difference']:+.3f}", "bits per byte on pretraining text", ranged(tax)))
    asked = result["degenerate"]["own"]["degenerate"]
    tiles.append(Tile(f"{asked['instruct']:.0%}", "degenerate answers", f"base: {asked['base']:.0%}"))
    answers = [
        Answer(f"instruct is better on {', '.join(better) or 'nothing'}", "its interval lies above zero"),
        Answer(f"instruct is worse on {', '.join(worse) or 'nothing'}", "below zero", good=not worse),
    ]
    if not result["same_tokenizer"]:
        answers.append(Answer("the tokenizers differ: losses are compared a byte, not a token", good=False))
    rows = [row(key, one["metric"], one) for key, one in tasks.items()]
    behaviour = [
        row(form, name, one)
        for form, metrics in result["degenerate"].items()
        for name, one in metrics.items()
    ]
    header = ["task", "metric", "base", "instruct", "difference (95% interval)", "items"]
    tables = [
        ("Tasks", Table(header, rows, texts=(0, 1))),
        ("Open prompts", Table(["format", *header[1:]], behaviour, texts=(0, 1))),
    ]
    if result["text"]:
        lines = [row("text", name, one) for name, one in result["text"].items()]
        tables.insert(1, ("Alignment tax: held-out pretraining text", Table(header, lines, texts=(0, 1))))
    tables.append(("The same prompts, greedily", samples(found)))
    return Page(
        f"{opened['base'].name} against {opened['instruct'].name}",
        __doc__.splitlines()[0],
        caution="Two tiny models, 40 steps each: nothing here says anything." * made_here,
        tiles=tiles,
        answers=answers,
        figures=[
            Drawing("differences", "Instruct minus base, by task and format", differences(tasks)),
            Drawing(
                "tasks",
                "Both models on each task, as text and in turns, with standard errors",
                values(tasks, found),
            ),
        ],
        tables=tables,
        notes=[
            f"{base.limit} items of each task at most, {base.few_shot} examples before each",
            *(
                f"{who}: {line}"
                for who, outcomes in found.items()
                for outcome in outcomes.values()
                for line in outcome.left_out(opened[who].context)
            ),
        ],
    )


def ranged(one: dict[str, float]) -> str:
    interval = f" ({one['low']:+.3f} to {one['high']:+.3f})" if math.isfinite(one["low"]) else ""
    return f"{one['difference']:+.3f}{interval}"


def row(key: str, metric: str, one: dict[str, Any]) -> list[str]:
    return [key, metric, f"{one['base']:.3f}", f"{one['instruct']:.3f}", ranged(one), str(one["count"])]


def samples(found: dict[str, dict[str, Outcome]], longest: int = 160) -> Table:
    """What each model says to each prompt, in both formats."""
    rows = []
    for index, item in enumerate(found["base"]["open_ended/raw"].items):
        for form in ("raw", "chat"):
            said = [found[who][f"open_ended/{form}"].answers[index][0].text for who in ("base", "instruct")]
            short = [" ".join(text.split())[:longest] for text in said]
            rows.append([item.record["prompt"], form, *short])
    return Table(["prompt", "format", "base", "instruct"], rows, texts=(0, 1, 2, 3))


@style.styled
def differences(tasks: dict[str, Any]) -> Any:
    """A line for each task and format: the difference with its interval, and zero."""
    figure, (axes,) = style.blank("Instruct minus base", 1.2 + 0.24 * len(tasks))
    for number, one in enumerate(tasks.values()):
        x = [one["low"], one["high"]]
        axes.plot(x, [number, number], color=style.LOOK.forecast, linewidth=1.4)
        axes.plot(one["difference"], number, "o", color=style.LOOK.forecast, markersize=4.5)
    axes.axvline(0, color=style.LOOK.ink, linewidth=0.8)
    axes.set_yticks(range(len(tasks)), list(tasks), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("difference, 95% interval over items")
    return style.finished(figure, "")


@style.styled
def values(tasks: dict[str, Any], outcomes: dict[str, dict[str, Outcome]]) -> Any:
    """A panel for each task: both models as text and in turns, with standard errors."""
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in tasks))
    figure, panels = style.blank("Tasks", 1.2 + 1.5 * len(names), [1] * len(names))
    colours = {"base": style.LOOK.law, "instruct": style.LOOK.forecast}
    for axes, name in zip(panels, names, strict=True):
        forms = [form for form in ("raw", "chat") if f"{name}/{form}" in tasks]
        for offset, (who, colour) in zip((-0.06, 0.06), colours.items(), strict=True):
            found = [outcomes[who][f"{name}/{form}"].metrics() for form in forms]
            first = [next(iter(metrics.values())) for metrics in found]
            y, errors = [one.value for one in first], [one.standard_error for one in first]
            place, shape = np.arange(len(forms)) + offset, {"color": colour, "label": who, "capsize": 3}
            axes.errorbar(place, y, errors, fmt=style.MARKERS[offset > 0], **shape)
        axes.set_xticks(range(len(forms)), forms)
        axes.set_xlim(-0.5, len(forms) - 0.5)
        axes.set_ylabel(f"{name}\n{tasks[f'{name}/raw']['metric']}", fontsize=8)
    return style.finished(figure, "")


# ---- pairs that are made ----


def trained(base: BaseVsInstruct, folder: Path) -> BaseVsInstruct:
    """The config with a base trained on books and what conversations make of it, trained if missing."""
    asked = instruct.get_config("cpu")
    train(asked.base, folder / "base")
    data = dataclasses.replace(asked.data, tokenizer=PretrainedTokenizer(str(folder / "base")))
    train(instruct.tuned(asked, data, folder / "base", "all")[1], folder / "instruct")
    return dataclasses.replace(base, base=str(folder / "base"), instruct=str(folder / "instruct"))


def made(base: BaseVsInstruct, folder: Path) -> BaseVsInstruct:
    """The config with a tiny base and instruct model, held-out text and a task, all made in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    sums = [(int(a), int(b)) for a, b in draw.integers(0, 5, (400, 2))]
    lines = [f"{a} plus {b} is {a + b}. " for a, b in sums]
    texts = ["".join(lines[start : start + 10]) for start in range(0, 400, 10)]
    records = [
        {"question": f"{a} plus {b} is", "choices": [f"{a + b}.", f"{a + b + 1}."], "answer": 0}
        for a, b in sums[:12]
    ]
    turns = [
        [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
        for a, b in sums
    ]
    task = {"kind": "multiple_choice", "file": "sums.jsonl", "question": "{question}"}
    for name, rows in {
        "books.jsonl": [{"text": text} for text in texts[:32]],
        "held.jsonl": [{"text": text} for text in texts[32:]],
        "talks.jsonl": [{"messages": messages} for messages in turns],
        "sums.jsonl": records,
        "sums.json": [task],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    tasks = tuple(str(folder / name) if name.endswith(".json") else name for name in base.tasks)
    paths = {name: str(folder / name) for name in data if getattr(base, name) == "tiny"}
    return dataclasses.replace(base, tasks=tasks, text=str(folder / "held.jsonl"), **paths)
