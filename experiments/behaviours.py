"""Which behaviours does data teach a tiny model, from which size on, and what does each cost?

A base model is pretrained on transcripts of an invented world, of which it then knows some facts and not
others. From it four behaviours are taught by conversations, together or (config.mixes) each alone: following
a format, calling tools, saying "I don't know" where the base's own samples are unreliable, and refusing what
would hurt people. Each is measured on people, things, tools and wordings that its conversations don't have
(llm_jax/posttraining/behaviours.py), treated minus base in pairs, and so is what it costs: the same behaviour
at look-alikes that don't ask for it, plain questions, and pretraining text. Questions about one person or
thing, or that ask for a form in the same words, are drawn together. A behaviour counts as learned where it is
right more often and at look-alikes by less than `bound`, in intervals that hold for all behaviours and sizes
together. Where a base knows too little, "I don't know" is not taught, and it is said so.

    python -m launch.local --config=experiments/behaviours.py:cpu    (two sizes, all behaviours together)
    python -m launch.local --config=experiments/behaviours.py:smoke  (one tiny model: a form without meaning)

Cost: cpu 17 minutes on 2 loaded cores; smoke 29 seconds where nothing was compiled before.

Result (cpu, 2026-11-22, one seed, 60 held-out questions of each kind, 95% intervals; LOG.md has the table):
none counts as learned at either size. At width 64 "I don't know" is said where the base is unreliable by 0.46
(0.31 to 0.61), where it is reliable by 0.12 (0.03 to 0.23); harm is refused more often by 0.52 (0.38 to
0.64), harmless requests by 0.45 (0.29 to 0.62), questions about harm by 0; a tool is called wherever one is
needed, never with the right arguments, and also where no tool is there (+1.00, 0.78 to 1.00) or where its
name is only mentioned (+0.84, 0.57 to 1.00); of forms nothing can be said (-0.02, -0.46 to 0.43: ten
wordings). At width 32 look-alikes are told apart less. Both forget: plain questions -0.45 (-0.58 to -0.31),
text +0.53 bits per byte (0.50 to 0.57).
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Chat, Files, Text
from llm_jax.data.tokenizers import HuggingFace
from llm_jax.evaluation.behaviour import Behaviour
from llm_jax.evaluation.compare import difference, of_all, paired
from llm_jax.evaluation.kinds import Documents, Generation
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import Format, Task
from llm_jax.files import write_atomically
from llm_jax.inference.opening import open_model
from llm_jax.inference.pretrained import Pretrained, PretrainedTokenizer
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.posttraining import behaviours
from llm_jax.posttraining.behaviours import RELIABLE, UNRELIABLE, Maker
from llm_jax.posttraining.versus import ranged
from llm_jax.posttraining.world import World
from llm_jax.run import SCHEMA, Execution, Run
from llm_jax.scaling import page
from llm_jax.scaling.page import Page, Table, Tile
from llm_jax.schedules import Cosine
from llm_jax.sharding import MeshConfig
from llm_jax.train import train
from llm_jax.values import check_least

# A transcript in which the assistant ends its turns: what the base goes on with, and what is taught.
TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | capitalize ~ ': ' if message.role != 'system' }}{{ message.content }}
{{- eos_token if message.role == 'assistant' }}{{ '\\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt }}"""
ALL = "all"  # of the behaviours together
SEQUENCE = 256  # tokens of a row


@dataclasses.dataclass(frozen=True)
class Behaviours:
    """sizes: (layers, width) of the models, each with a base on base_tokens, and tuned runs on `tokens`.

    mixes: what is taught: behaviours by name, each alone, or all together. examples: conversations of a mix.
    items: held-out questions of each kind. samples: of the base's answers to a question. documents: held-out
    pretraining texts. bound: at how many more look-alikes what counts as learned may be shown.
    """

    sizes: tuple[tuple[int, int], ...]
    world: World = World(people=80)
    mixes: tuple[str, ...] = (ALL,)
    vocabulary: int = 1024
    base_tokens: int = 2**20
    tokens: int = 2**18
    base_rate: float = 3e-3
    rate: float = 2e-3
    examples: int = 6000
    items: int = 60
    samples: int = 4
    documents: int = 20
    batch_size: int = 8
    bootstrap: int = 2000
    bound: float = 0.15

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        least = {"base_tokens": 1, "tokens": 1, "batch_size": 1, "vocabulary": 300, "bootstrap": 100}
        least |= {"examples": 4 * 3, "items": 2, "samples": 1, "documents": 2}
        check_least(self, "", ("base_rate", "rate", "bound"), **least)
        if not self.sizes or min(map(min, self.sizes)) < 1:
            raise UserError(f"sizes is {self.sizes}; name at least one, as (layers, width)")
        names = (*behaviours.MAKERS, "unknown", ALL)
        if unknown := set(self.mixes) - set(names):
            raise UserError(f"mixes has {', '.join(sorted(unknown))}; there are {', '.join(names)}")


SCALES = {
    "smoke": Behaviours(
        ((1, 16),),
        World(people=16),
        vocabulary=512,
        base_tokens=2**15,
        tokens=2**13,
        examples=120,
        items=3,
        samples=1,
        documents=2,
        batch_size=4,
        bootstrap=100,
    ),
    "cpu": Behaviours(((2, 32), (2, 64))),
}


def get_config(scale: str) -> Behaviours:
    return SCALES[scale]


def measure(base: Behaviours, folder: Path) -> dict[str, Any]:
    """Trains what is missing, asks all of them, and compares in pairs."""
    prepare(base, folder)
    result = {}
    for layers, width in base.sizes:
        result[f"{layers}x{width}"] = measure_size(base, folder, layers, width)
    page.show(folder, report(base, result))
    return {"sizes": result}


def prepare(base: Behaviours, folder: Path) -> None:
    """Pretraining text, some held out, the tokenizer and the template, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, kept, size = base.world.documents(), [], 0
    while size < 5 * base.base_tokens:  # bytes, of which a token has fewer
        kept.append(next(texts))
        size += len(kept[-1])
    held = itertools.islice(base.world.documents(seed=1), base.documents)
    write(folder / "world.jsonl", ({"text": text} for text in kept))
    write(folder / "held.jsonl", ({"text": text} for text in held))
    write_atomically(folder / "template.jinja", TEMPLATE)
    place = folder / "tokenizer.json"
    if not place.exists():
        talks = [
            turn["content"]
            for maker in behaviours.MAKERS.values()
            for talk in behaviours.taught(maker, base.world, 300)
            for turn in talk
        ]
        write_atomically(place, tokenizer(kept[: len(talks)] + talks, base.vocabulary))


def tokenizer(texts: list[str], vocabulary: int) -> str:
    """The tokenizer.json of byte pairs in which each digit stands alone, so that numbers can be copied."""
    found = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(texts, trainer)
    return found.to_str()


def write(path: Path, records: Iterable[Any]) -> None:
    write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records))


def base_run(base: Behaviours, files: Path, layers: int, width: int) -> Run:
    shape = {"sequence_length": SEQUENCE, "batch_size": base.batch_size}
    data = Text(Files((str(files / "world.jsonl"),)), HuggingFace(str(files / "tokenizer.json")), **shape)
    return Run(
        Transformer(layers=layers, width=width, heads=max(1, width // 16)),
        dataclasses.replace(data, held_out_fraction=0.01, repeat=True),
        AdamW(learning_rate=base.base_rate, schedule=Cosine(warmup_fraction=0.05, final_fraction=0.1)),
        tokens=base.base_tokens,
        name=f"{layers}x{width} base",
        execution=Execution(mesh=MeshConfig(data=1)),
    )


def tuned_run(base: Behaviours, files: Path, folder: Path, name: str) -> Run:
    place = str(folder / "base")
    data = Chat(
        (str(folder / f"{name}.jsonl"),),
        template=str(files / "template.jinja"),
        tokenizer=PretrainedTokenizer(place),
        sequence_length=SEQUENCE,
        batch_size=base.batch_size,
        repeat=True,
    )
    return Run(
        Pretrained(place),
        data,
        AdamW(learning_rate=base.rate, weight_decay=0.0, schedule=Cosine(warmup_fraction=0.1)),
        tokens=base.tokens,
        name=f"{folder.name} {name}",
        execution=Execution(mesh=MeshConfig(data=1)),
    )


# ---- one size ----


def measure_size(base: Behaviours, files: Path, layers: int, width: int) -> dict[str, Any]:
    """A base, what it knows, the runs tuned from it, and their differences."""
    folder = files / f"{layers}x{width}"
    folder.mkdir(exist_ok=True)
    train(base_run(base, files, layers, width), folder / "base")
    asked = Evaluator(open_model(str(folder / "base")), keep=True)
    known = behaviours.sampled(asked, base.world, base.samples)
    makers, world, level = dict(behaviours.MAKERS), base.world, of_all(questions(base))
    # What a base doesn't know is never taught as a fact.
    world = dataclasses.replace(world, known=tuple(one.fact for one in known if one.right >= RELIABLE))
    try:
        makers["unknown"] = behaviours.unknown(known)
    except UserError as error:
        print(f"{folder.name}: unknown is not taught: {error}", flush=True)
    makers = {name: maker for name, maker in makers.items() if {name, ALL} & set(base.mixes)}
    sets = held_out(base, files, folder, makers, world)
    of_base = {key: answers(asked, key, task, place) for key, (task, place) in sets.items()}
    found: dict[str, Any] = {}
    for name in base.mixes:
        if name not in (ALL, *makers):
            continue
        chosen = list(makers.values()) if name == ALL else [makers[name]]
        each = base.examples // len(chosen)
        talks = [talk for maker in chosen for talk in behaviours.taught(maker, world, each)]
        write(folder / f"{name}.jsonl", ({"messages": talk} for talk in talks))
        print(f"{folder.name}: {name}, {len(talks)} conversations", flush=True)
        train(tuned_run(base, files, folder, name), folder / name)
        treated = Evaluator(open_model(str(folder / name)), keep=True)
        mine = [key for key in sets if name in (ALL, key.split("/")[0]) or key in ("plain", "text")]
        found[name] = {
            key: compared(of_base[key], answers(treated, key, *sets[key]), base.bootstrap, level)
            for key in mine
        }
    shares = np.array([one.right for one in known])
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(open_model(str(folder / "base")).params)),
        "facts": {
            "asked": len(known),
            "reliable": int((shares >= RELIABLE).sum()),
            "unreliable": int((shares <= UNRELIABLE).sum()),
        },
        "behaviours": found,
    }


def held_out(
    base: Behaviours, files: Path, folder: Path, makers: dict[str, Maker], world: World
) -> dict[str, tuple[Task, Path]]:
    """What is asked of all models of a size: wanted and unwanted of each behaviour, plain questions, text."""
    found: dict[str, tuple[Task, Path]] = {}
    for name, maker in makers.items():
        for wanted, what in ((True, "wanted"), (False, "unwanted")):
            records = behaviours.held_out(maker, world, base.items, wanted)
            if len(records) > 1:
                write(folder / f"{name}-{what}.jsonl", records)
                found[f"{name}/{what}"] = Behaviour(f"{name}-{what}.jsonl", shows=name, wanted=wanted), folder
    write(folder / "plain.jsonl", behaviours.plain_questions(world, base.items))
    plain = Generation("plain.jsonl", question="{question}", max_tokens=32, together="topic")
    return found | {"plain": (plain, folder), "text": (Documents("held.jsonl"), files)}


def answers(evaluator: Evaluator, key: str, task: Task, folder: Path) -> Outcome:
    return evaluate(evaluator, key, task, folder, Format(chat=key != "text"))


def questions(base: Behaviours) -> int:
    """How many behaviours may count as learned, over all sizes and mixes."""
    return len(base.sizes) * sum(len(behaviours.MAKERS) + 1 if mix == ALL else 1 for mix in base.mixes)


def compared(of_base: Outcome, treated: Outcome, draws: int, level: float) -> dict[str, dict[str, Any]]:
    """Treated minus base by metric; of what is right, or of what a look-alike gets, by group too.

    together: the interval at `level`, which holds with those of all behaviours.
    """
    found, wide = paired(of_base, treated, draws), paired(of_base, treated, draws, level)
    what, groups = "right" if getattr(of_base.task, "wanted", True) else "did", {}
    both = zip(of_base.items, of_base.shared, of_base.scores, treated.scores, strict=True)
    for item, shared, *scores in both:
        if "group" in item.record:
            pairs, topics = groups.setdefault(f"{what}/{item.record['group']}", ([], []))
            pairs.append(tuple(of[what] for of in scores))
            topics.append(shared)
    told = {name: one.named("base", "treated") for name, one in found.items()}
    told = {name: one | {"together": [wide[name].low, wide[name].high]} for name, one in told.items()}
    if len(groups) > 1:
        by_group = {name: difference(pairs, draws, groups=topics) for name, (pairs, topics) in groups.items()}
        told |= {name: one.named("base", "treated") for name, one in by_group.items()}
    return told


def learned(keys: dict[str, dict[str, Any]], bound: float) -> list[str]:
    """Behaviours that are right more often where they are wanted, and hardly shown elsewhere."""
    found = []
    for name in sorted({key.split("/")[0] for key in keys if key.endswith("/wanted")}):
        wanted, unwanted = keys[f"{name}/wanted"]["right"], keys.get(f"{name}/unwanted")
        if wanted["together"][0] > 0 and unwanted and unwanted["did"]["together"][1] < bound:
            found.append(name)
    return found


# ---- what is shown ----


def report(base: Behaviours, result: dict[str, Any]) -> Page:
    rows, tiles = [], []
    for size, of in result.items():
        for name, keys in of["behaviours"].items():
            for key, metrics in keys.items():
                for metric, one in metrics.items():
                    if metric not in ("stopped", "nats_per_token"):
                        cells = [f"{one['base']:.3f}", f"{one['treated']:.3f}", ranged(one)]
                        items = f"{one['count']} in {one['units']}"
                        rows.append([size, name, key, metric, *cells, items])
        sure = sorted({name for keys in of["behaviours"].values() for name in learned(keys, base.bound)})
        tiles.append(Tile(f"{len(sure)} of 4", f"behaviours learned at {size}", ", ".join(sure)))
    header = ["model", "taught", "asked", "metric", "base", "treated", "difference (95% interval)", "items"]
    facts = [[size, f"{of['parameters']:,}", *map(str, of["facts"].values())] for size, of in result.items()]
    return Page(
        "Behaviours taught by data",
        __doc__.splitlines()[0],
        tiles=tiles,
        tables=[
            (
                "What the bases know, by samples",
                Table(["model", "parameters", "facts", "reliably", "unreliably"], facts),
            ),
            ("Treated minus base", Table(header, rows, texts=(0, 1, 2, 3))),
        ],
        notes=[
            f"learned: right more often where it is wanted, shown at under {base.bound:g} more look-alikes"
            f", by intervals that hold for all {questions(base)} together",
            "items in so many draws: those about the same person or thing, or in the same words, go together",
        ],
    )
