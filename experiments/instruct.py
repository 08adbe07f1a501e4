"""Does LoRA learn conversations as well as training all parameters does, and does it forget less of books?

A base model is trained on books and then on conversations, whole and by LoRA, each at several rates. The best
rate is that with the least loss on the answers of every second held-out conversation; what is told is of the
others, in the run's last state. What was forgotten is how much the loss on held-out books has risen (Biderman
et al. 2024, arXiv:2405.09673, ask so of large models).

    python -m launch.local --config=experiments/instruct.py:cpu      (reads the books and conversations below)
    python -m launch.local --config=experiments/instruct.py:smoke    (Python's source, made-up conversations)

Cost: smoke 17 CPU seconds; cpu 40 minutes beside much other work (load 10 to 20). It reads the training
books of pretrain_small/ and gpteacher_roleplay.json.xz and topical_chat_valid_freq.json.xz of sft/, both in
the folder LLM_JAX_REFERENCE_DATA (by default ../shared/data).

Result (cpu, 2026-11-22), nats/token: no, and only because it learns less. At the best rates LoRA's answers
are worse by 0.308 (95% interval 0.272 to 0.345, 61 conversations) and its books better by 0.35 (0.24 to 0.46,
two books). But where both have learned as much of the answers (5.12, between two rates), LoRA has lost 0.16
more on the books. Both best rates are the highest that were tried, so this is about short training of a model
of 0.3M parameters, one seed.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config, sharding
from llm_jax.config import UserError
from llm_jax.data import Chat, Files, HeldOut, Python, SentencePiece, Text
from llm_jax.evaluation.compare import Difference, difference
from llm_jax.held_out import by_document, make_scorer, score
from llm_jax.inference.opening import open_model
from llm_jax.inference.pretrained import Pretrained, PretrainedTokenizer
from llm_jax.member import Hook
from llm_jax.models import ModelConfig
from llm_jax.models.lora import LoRA
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.pack import train_packed
from llm_jax.run import SCHEMA, Checkpointing, Execution, Run
from llm_jax.scaling import page, plots
from llm_jax.scaling.page import Drawing, Page, Table, Tile
from llm_jax.schedules import Cosine
from llm_jax.sharding import MeshConfig
from llm_jax.train import train
from llm_jax.values import check_least

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("LLM_JAX_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
MADE_UP = ("made-up.jsonl",)  # in the experiment's folder
ALONE = Execution(mesh=MeshConfig(data=1))
BATCH = 8  # rows that are scored at once
Scores = dict[str, tuple[np.ndarray, np.ndarray]]  # (nats, tokens) of each document, by what it is


@dataclasses.dataclass(frozen=True)
class Instruct:
    """A base run, and what it is tuned on: conversations of `data`, or made-up ones where that names MADE_UP.

    rates: of all parameters. lora_rates: of LoRA at `rank`. evaluations: during each, and at its end.
    """

    base: Run
    data: Chat
    tokens: int
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lora_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    rank: int = 8
    evaluations: int = 3
    bootstrap: int = 2000

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        check_least(self, "", tokens=1, rank=1, evaluations=1, bootstrap=100)
        if not self.rates or not self.lora_rates:
            raise UserError("rates and lora_rates name at least one each")


def _smoke() -> Instruct:
    text = Text(Python(), sequence_length=64, batch_size=8, held_out_bytes=2**13)
    base = Run(
        Transformer(layers=1, width=16, heads=1), text, tokens=30 * text.tokens_per_step, execution=ALONE
    )
    data = Chat(MADE_UP, template="plain", sequence_length=128, batch_size=8)
    rates = {"rates": (1e-3, 1e-2), "lora_rates": (1e-3, 1e-2)}
    return Instruct(base, data, 20 * data.tokens_per_step, **rates, rank=2, evaluations=1, bootstrap=100)


def _cpu() -> Instruct:
    names = ("austen", "shakespeare", "storybook")
    books = Files(tuple(str(REFERENCE / "pretrain_small" / f"{name}_train.jsonl.xz") for name in names))
    held_out = {"held_out_fraction": 0.1, "held_out_bytes": 2**18}
    text = Text(books, SentencePiece(vocabulary=2048), batch_size=16, **held_out)
    rate = AdamW(learning_rate=3e-3, schedule=Cosine(warmup_fraction=0.05, final_fraction=0.1))
    model = Transformer(layers=4, width=64, heads=4)
    base = Run(model, text, rate, tokens=2**20, name="base", execution=ALONE)
    talks = ("gpteacher_roleplay.json.xz", "topical_chat_valid_freq.json.xz")
    paths = tuple(str(REFERENCE / "sft" / name) for name in talks)
    return Instruct(base, Chat(paths, template="plain", batch_size=8), 2**17)


SCALES: dict[str, Callable[[], Instruct]] = {"smoke": _smoke, "cpu": _cpu}


def get_config(scale: str) -> Instruct:
    return SCALES[scale]()


def measure(base: Instruct, folder: Path) -> dict[str, Any]:
    """Trains what is missing, scores the last state of each run, and compares the methods."""
    data, held_out = begun(base, folder)
    runs = {name: trained(base, data, held_out, folder, name) for name in ("all", "lora")}
    found = {"base": scores(folder / base.base.identity(), held_out)}
    found |= {run.name: of for members in runs.values() for run, of in members.items()}
    best = {name: chosen(members) for name, members in runs.items()}
    pairs = {f"{name} - base": (run.name, "base") for name, run in best.items()}
    pairs["lora - all"] = best["lora"].name, best["all"].name

    def compare(one: str, other: str, what: str) -> Difference:
        pairs = [np.transpose(found[name][what]) for name in (other, one)]
        return difference(np.stack(pairs, axis=1), base.bootstrap)

    told = ("answers", "books")
    result = {
        "loss": {name: {what: loss(of[what]) for what in told} for name, of in found.items()},
        "best": {name: run.optimizer.learning_rate for name, run in best.items()},
        "difference": {
            pair: {what: compare(one, other, what)._asdict() for what in told}
            for pair, (one, other) in pairs.items()
        },
        "documents": {what: len(of[0]) for what, of in found["base"].items()},
    }
    page.show(folder, report(result))
    return result


def begun(base: Instruct, folder: Path) -> tuple[Chat, dict[str, HeldOut]]:
    """The conversations in the tokens of the base, which is trained if missing, and what is held out."""
    place = folder / base.base.identity()
    print(f"base: {base.base.steps:,} steps", flush=True)
    train(base.base, place)
    data = dataclasses.replace(base.data, tokenizer=PretrainedTokenizer(str(place)))
    if data.paths == MADE_UP:
        data = dataclasses.replace(data, paths=(str(made_up(folder / MADE_UP[0])),))
    held_out = {"books": base.base.data.open().held_out(), "answers": data.open().held_out()}
    if None in held_out.values() or held_out["answers"].documents < 2:
        raise UserError("both are scored on what is held out: set data.held_out_fraction=0.05")
    return data, held_out


def trained(
    base: Instruct, data: Chat, held_out: dict[str, HeldOut], folder: Path, name: str
) -> dict[Run, Scores]:
    """The runs of one method with their scores, trained where they are missing."""
    members = tuned(base, data, folder / base.base.identity(), name)
    print(f"{name}: {len(members)} runs of {members[0].steps:,} steps, packed", flush=True)
    hooks = [[forgetting(run, held_out["books"])] for run in members]
    train_packed(members, [folder / run.identity() for run in members], hooks)
    return {run: scores(folder / run.identity(), held_out) for run in members}


def chosen(members: dict[Run, Scores]) -> Run:
    """The run with the best rate, by conversations of which nothing else is told."""
    return min(members, key=lambda run: loss(members[run]["choice"]))


def tuned(base: Instruct, data: Chat, place: Path, name: str) -> list[Run]:
    """The runs of one method, one a rate."""
    start: ModelConfig = Pretrained(str(place))
    rates = base.lora_rates if name == "lora" else base.rates
    model = LoRA(start, rank=base.rank, alpha=2 * base.rank) if name == "lora" else start
    every = max(1, base.tokens // data.tokens_per_step // base.evaluations)
    execution = dataclasses.replace(ALONE, evaluate_every_steps=every, checkpoint=Checkpointing(keep_last=1))
    schedule = Cosine(warmup_fraction=0.1, final_fraction=0.1)
    return [
        Run(
            model,
            data,
            AdamW(learning_rate=rate, weight_decay=0.0, schedule=schedule),
            tokens=base.tokens,
            name=f"{name} at {rate:g}",
            execution=execution,
        )
        for rate in rates
    ]


def forgetting(run: Run, books: HeldOut) -> Hook:
    """What every evaluation adds: the loss on held-out books."""
    scorer = make_scorer(run.resolved_model.build())
    mesh = sharding.make_mesh(ALONE.mesh, jax.devices()[:1])
    return lambda step, params: {"books": score(scorer, params, books, run.data.batch_size, mesh)[0]["loss"]}


# ---- scores by document ----


def scores(place: Path, held_out: dict[str, HeldOut]) -> Scores:
    """(nats, tokens) of each held-out document for the run in a folder; of conversations every second one is
    for the choice of a rate, and the others are told.
    """
    opened, mesh = open_model(str(place)), sharding.make_mesh(ALONE.mesh, jax.devices()[:1])
    scorer = make_scorer(opened.config.build())
    found = {}
    for what, of in held_out.items():
        nats, tokens = by_document(scorer, opened.params, of, BATCH, mesh)
        found[what] = nats[0], tokens
    nats, tokens = found["answers"]
    return found | {"choice": (nats[::2], tokens[::2]), "answers": (nats[1::2], tokens[1::2])}


def loss(by: tuple[np.ndarray, np.ndarray]) -> float:
    """Nats a token."""
    return float(by[0].sum() / by[1].sum())


# ---- made-up conversations ----

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eve", "Finn")
THINGS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "gold": "yellow"}


def made_up(path: Path, count: int = 400) -> Path:
    """A file of small talk with few answers to learn."""

    def talks() -> Iterator[list[dict[str, str]]]:
        random = np.random.default_rng(0)
        for _ in range(count):
            name, thing, number = random.choice(NAMES), random.choice(list(THINGS)), random.integers(2, 9)
            asked = [(f"Hello, I am {name}.", f"Hello {name}!"), (f"Which colour is {thing}?", THINGS[thing])]
            asked += [(f"What comes after {number}?", str(number + 1))]
            yield [
                {"role": role, "content": text}
                for at in random.permutation(3)
                for role, text in zip(("user", "assistant"), asked[at], strict=True)
            ]

    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks()))
    return path


# ---- what is shown ----


def report(result: dict[str, Any]) -> Page:
    def ranged(of: dict[str, float]) -> str:
        interval = f" ({of['low']:+.4f} to {of['high']:+.4f})" if math.isfinite(of["low"]) else ""
        return f"{of['difference']:+.4f}{interval}"

    losses, differences = result["loss"], result["difference"]
    rows = [[name, f"{of['answers']:.4f}", f"{of['books']:.4f}"] for name, of in losses.items()]
    pairs = [[name, ranged(of["answers"]), ranged(of["books"])] for name, of in differences.items()]
    series = [
        plots.Series(way, *zip(*points, strict=True))
        for way in ("base", "all", "lora")
        for points in [
            [(of["answers"], of["books"]) for name, of in losses.items() if name.split()[0] == way]
        ]
    ]
    panel = plots.Panel("loss on answers [nats/token]", "loss on books [nats/token]", series, log="")
    apart = differences["lora - all"]
    return Page(
        "From base to instruct",
        __doc__.splitlines()[0],
        tiles=[
            Tile(
                f"{apart[what]['difference']:+.4f}",
                f"LoRA less all parameters, nats/token of {what}",
                ranged(apart[what]),
            )
            for what in ("answers", "books")
        ],
        figures=[
            Drawing(
                "instruct",
                "What was learned and what was forgotten",
                plots.draw("Learned and forgotten", [panel]),
            )
        ],
        tables=[
            ("Held-out loss, nats/token", Table(["run", "answers", "books"], rows)),
            ("Differences at the best rates, 95% intervals", Table(["pair", "answers", "books"], pairs)),
        ],
        notes=[
            f"held out: {result['documents']['answers']} conversations, {result['documents']['books']} books"
            f"; the best rates by {result['documents']['choice']} other conversations"
        ],
    )
