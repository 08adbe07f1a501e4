"""Two models on the same tasks: what lies between them, as numbers and as a page.

Differences are taken item by item. Each has its own 95% interval; what counts as better or worse is told by
intervals that hold all together 95 times of 100, however many tasks and formats are compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.config import UserError
from llm_jax.evaluation.compare import Difference, of_all, paired
from llm_jax.evaluation.requests import beginning
from llm_jax.evaluation.scores import Outcome
from llm_jax.evaluation.tasks import HIGHEST
from llm_jax.inference.opening import Opened
from llm_jax.scaling import style
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile

WHO = "base", "instruct"
Outcomes = Mapping[str, Mapping[str, Outcome]]  # by model, then by NAME/FORMAT, or "text"


def same_tokens(one: Opened, other: Opened, texts: Sequence[str]) -> bool:
    """Whether both read a text as the same tokens, so that losses a token can be compared."""
    return all(np.array_equal(one.encode(text), other.encode(text)) for text in texts)


def same_beginning(one: Opened, other: Opened) -> int | None:
    """The token that stands before a text for the one, if it is the same for the other."""
    number = int(beginning(one))
    return number if one.tokenizer.spelling(number) == other.tokenizer.spelling(number) else None


def compared(found: Outcomes, comparable: bool) -> dict[str, Any]:
    """{"tasks": {"NAME/FORMAT": {base, instruct, difference, low, high, ...}}, "degenerate", "text",
    "left_out": {MODEL: {"NAME/FORMAT": {cut, skipped}}}, ...}

    Formats are raw, chat, and own: the base on text, the instruct model in turns. together: the interval of a
    task's first metric that holds with all the others.
    """
    base, instruct = (found[who] for who in WHO)
    asked = [name for name in base if name != "text"]
    keys = {name: (name, name) for name in asked}
    keys |= {f"{n[:-4]}/own": (n, f"{n[:-4]}/chat") for n in asked if n.endswith("/raw")}
    level = of_all(max(1, sum(not key.startswith("open_ended/") for key in keys)))
    tasks, degenerate = {}, {}
    for key, (one, other) in sorted(keys.items()):
        metrics = {name: told(of) for name, of in paired(base[one], instruct[other]).items()}
        if key.startswith("open_ended/"):
            degenerate[key.partition("/")[2]] = metrics
            continue
        if not metrics:
            raise UserError(f"{key}: there is no item of which something can be said for both models")
        name, first = next(iter(metrics.items()))
        wide = paired(base[one], instruct[other], level=level)[name]
        about = {"metric": name, "best": base[one].task.metrics[name], "metrics": metrics}
        tasks[key] = first | {"together": [wide.low, wide.high]} | about
    text = paired(base["text"], instruct["text"]) if "text" in base else {}
    return {
        "tasks": tasks,
        "comparisons": len(tasks),
        "degenerate": degenerate,
        "text": {name: told(of) for name, of in text.items() if comparable or name != "nats_per_token"},
        "same_tokenizer": comparable,
        "left_out": {
            who: {key: {"cut": one.cut, "skipped": one.skipped} for key, one in outcomes.items()}
            for who, outcomes in found.items()
        },
    }


def told(one: Difference) -> dict[str, Any]:
    return one.named(*WHO)


def gain(one: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of what instruct gains, with all others': of a loss, by how much it is lower."""
    low, high = one["together"]
    return (low, high) if one["best"] == HIGHEST else (-high, -low)


# ---- what is shown ----


def report(
    question: str, names: Sequence[str], found: Outcomes, result: Mapping[str, Any], notes: Sequence[str]
) -> Page:
    tasks, text = result["tasks"], result["text"]
    better = [key for key, one in tasks.items() if gain(one)[0] > 0]
    worse = [key for key, one in tasks.items() if gain(one)[1] < 0]
    own = [one["difference"] for key, one in tasks.items() if key.endswith("/own") and one["best"] == HIGHEST]
    tiles = []
    if own:  # losses are in units of their own
        meant = f"{len(own)} tasks, each model as it is meant to be asked"
        tiles.append(Tile(f"{np.mean(own):+.3f}", "mean difference", meant))
    if tax := text.get("bits_per_byte"):
        tiles.append(Tile(f"{tax['difference']:+.3f}", "bits per byte on pretraining text", ranged(tax)))
    asked = result["degenerate"]["own"]["degenerate"]
    tiles.append(Tile(f"{asked['instruct']:.0%}", "degenerate answers", f"base: {asked['base']:.0%}"))
    sure = f"its interval, one of {len(tasks)} that hold together, lies"
    told_apart = (("better", better, "above"), ("worse", worse, "below"))
    answers = [
        Answer(f"instruct is {how} on {', '.join(on)}", f"{sure} {side} zero", good=how == "better")
        for how, on, side in told_apart
        if on
    ] or [
        Answer(
            "neither is better on any task", f"none of {len(tasks)} intervals that hold together leaves zero"
        )
    ]
    if not result["same_tokenizer"]:
        answers.append(Answer("the tokenizers differ: losses are compared a byte, not a token", good=False))
    rows = [row(key, one["metric"], one) for key, one in tasks.items()]
    rows += [
        row(f"{key} by the commonest answer", "accuracy", one["metrics"]["commonest"])
        for key, one in tasks.items()
        if key.endswith("/raw") and "commonest" in one["metrics"]
    ]
    behaviour = [row(*at, one) for at, one in _flat(result["degenerate"])]
    header = ["task", "metric", *WHO, "difference (95% interval)", "items"]
    tables = [
        ("Tasks", Table(header, rows, texts=(0, 1))),
        ("Open prompts", Table(["format", *header[1:]], behaviour, texts=(0, 1))),
    ]
    if text:
        lines = [row("text", name, one) for name, one in text.items()]
        tables.insert(1, ("Alignment tax: held-out pretraining text", Table(header, lines, texts=(0, 1))))
    tables.append(("The same prompts, greedily", samples(found)))
    titled = "Both models on each task, as text and in turns, with standard errors"
    return Page(
        " against ".join(names),
        question,
        tiles=tiles,
        answers=answers,
        figures=[
            Drawing("differences", "Instruct minus base, by task and format", differences(tasks)),
            Drawing("tasks", titled, values(tasks, found)),
        ],
        tables=tables,
        notes=notes,
    )


def _flat(nested: Mapping[str, Mapping[str, Any]]) -> list[tuple[tuple[str, str], Any]]:
    return [((one, other), value) for one, of in nested.items() for other, value in of.items()]


def ranged(one: Mapping[str, float]) -> str:
    interval = f" ({one['low']:+.3f} to {one['high']:+.3f})" if math.isfinite(one["low"]) else ""
    return f"{one['difference']:+.3f}{interval}"


def row(key: str, metric: str, one: Mapping[str, Any]) -> list[str]:
    """A line of a table; items that are no independent draws are told with how many draws they are."""
    items = f"{one['count']} in {one['units']}" if one["units"] < one["count"] else str(one["count"])
    return [key, metric, f"{one['base']:.3f}", f"{one['instruct']:.3f}", ranged(one), items]


def samples(found: Outcomes, longest: int = 160) -> Table:
    """What each model says to each prompt, in both formats."""
    rows = []
    for index, item in enumerate(found["base"]["open_ended/raw"].items):
        for form in ("raw", "chat"):
            said = [found[who][f"open_ended/{form}"].answers[index][0].text for who in WHO]
            short = [" ".join(text.split())[:longest] for text in said]
            rows.append([item.record["prompt"], form, *short])
    return Table(["prompt", "format", *WHO], rows, texts=(0, 1, 2, 3))


@style.styled
def differences(tasks: Mapping[str, Any]) -> Any:
    """A line for each task and format: the difference with its interval (thin: that of all together), and
    zero.
    """
    figure, (axes,) = style.blank("Instruct minus base", 1.2 + 0.24 * len(tasks))
    for number, one in enumerate(tasks.values()):
        for interval, width in ((one["together"], 0.6), ([one["low"], one["high"]], 1.8)):
            axes.plot(interval, [number, number], color=style.LOOK.forecast, linewidth=width)
        axes.plot(one["difference"], number, "o", color=style.LOOK.forecast, markersize=4.5)
    axes.axvline(0, color=style.LOOK.ink, linewidth=0.8)
    axes.set_yticks(range(len(tasks)), list(tasks), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("difference, 95% intervals over items, alone and all together")
    return style.finished(figure, "")


@style.styled
def values(tasks: Mapping[str, Any], outcomes: Outcomes) -> Any:
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
