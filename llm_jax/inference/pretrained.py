"""Models to be trained on: the folder of a run, a directory in Hugging Face's format, a GGUF file.

    --config.model=runs/base --config.data.tokenizer=runs/base
    --config.model=path/to/SmolLM2 --config.data.tokenizer=path/to/SmolLM2

Where it lies is no part of a run's identity; what it holds is, the files' hash or a run's identity and steps.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import files, manifest, sharding
from llm_jax.config import UserError, outside_identity
from llm_jax.data import Tokenizer
from llm_jax.data.cache import digest
from llm_jax.data.templates import Template
from llm_jax.data.tokenizers import HuggingFaceCodec, Sample
from llm_jax.inference import opening
from llm_jax.inference.opening import Described
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.tokenizer import Portable
from llm_jax.models import ModelConfig, Params
from llm_jax.records import load_run

PROBE = "The 3 cats’ naïve plan cost €5.99:\n\tdef f(x):\n        return x ** 2  # 中文, русский 🙂\n"


@dataclasses.dataclass(frozen=True)
class Pretrained(ModelConfig, kind="pretrained"):
    """A model that exists, with its parameters, at `path`.

    Token ids that the data has beyond those of the model's tokenizer (special tokens of a chat template) have
    the mean of all rows of the embedding, and of the head, to begin with: an unlikely token that changes no
    other's probability much (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). dtype: of
    computing, as stored if none; parameters are trained in float32.
    """

    path: str = outside_identity("")
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] | None = None

    def validate(self) -> None:
        if not self.path:
            raise UserError("model.path is empty; name a model: --config.model=runs/base")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")

    def fingerprint(self) -> dict[str, Any]:
        """What the model at the path adds to a run's identity."""
        return {"content": content(self.path)}

    def resolve(self, data: Any) -> ModelConfig:
        """The model's own config, with as many token ids as the data has."""
        self.validate()
        config = described(self.path).config
        changes = {"dropout": self.dropout, "dtype": self.dtype or config.dtype}
        changes["vocabulary"] = max(config.vocabulary, data.vocabulary)
        return dataclasses.replace(config, **changes).resolve(data)

    def beginning(self, data: Any, codec: Any) -> Callable[[Mesh], Params]:
        found = described(self.path)
        self._check(found, data, codec)
        known, vocabulary = self._known(found), data.vocabulary
        return lambda mesh: widened(found.read(mesh), known, vocabulary, mesh)

    def record(self, data: Any) -> Mapping[str, Any]:
        found = described(self.path)
        new = max(0, data.vocabulary - self._known(found))
        how = {"new_rows": "the mean of the others"} if new else {}
        return {"path": self.path, "content": content(self.path), "new_tokens": new} | how

    def _known(self, found: Described) -> int:
        """How many token ids mean something to the model."""
        vocabulary = found.config.vocabulary
        return min(found.tokenizer.ids, vocabulary) if found.tokenizer else vocabulary

    def _check(self, found: Described, data: Any, codec: Any) -> None:
        """Raises UserError where the data's tokens aren't the model's."""
        if found.tokenizer is None or codec is None:
            if data.vocabulary > found.config.vocabulary:
                raise UserError(
                    f"{self.path} has {found.config.vocabulary:,} token ids and no tokenizer, and the data "
                    f"has {data.vocabulary:,}: give the tokenizer that it was trained with"
                )
            return
        ours = opening.tokenizer_of(data, codec)
        if not alike(ours, found.tokenizer):
            raise UserError(
                f"the data's tokenizer ({data.tokenizer.kind}, {ours.ids:,} ids) is not that of {self.path} "
                f"({found.tokenizer.ids:,} ids); --config.data.tokenizer={self.path} takes that"
            )


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer(Tokenizer, kind="pretrained"):
    """The tokenizer of the model at `path`; a run keeps a copy of it."""

    path: str = outside_identity("")

    def validate(self) -> None:
        if not self.path:
            raise UserError("data.tokenizer.path is empty; name a model: --config.data.tokenizer=runs/base")

    def size(self) -> int:
        return self.open().vocabulary

    def open(self, sample: Sample | None = None, content: str = "") -> HuggingFaceCodec:
        self.validate()
        return _codec(self.path, _stamp(self.path))

    def content(self) -> str:
        self.validate()
        portable = _portable(self.path)
        return digest([portable.data, dict(portable.special)])

    def template(self) -> Template | None:
        """The model's chat template, with those of its special tokens that it writes."""
        portable = _portable(self.path)
        return portable.template if portable.chat_template else None

    def id_of(self, name: str) -> int | None:
        return self.open().id_of(name)

    def named(self, template: str) -> Template:
        return self.open().named(template)

    def keep(self, data: Any, source: Any, folder: pathlib.Path) -> None:
        place = folder / opening.TOKENIZER
        if files.in_bucket(folder):  # each of them is whole, and the same at every start
            tokenizers.write(opening.tokenizer_of(data, source.codec), place)
        elif not place.exists():
            partial = place.with_name(f"{place.name}.partial")
            partial.mkdir(exist_ok=True)
            tokenizers.write(opening.tokenizer_of(data, source.codec), partial)
            partial.rename(place)


def alike(one: Portable, other: Portable) -> bool:
    """Whether two tokenizers are one, but for ids at the end that only one of them has."""
    ours, theirs = ({number: piece for piece, number in of.vocabulary_of().items()} for of in (one, other))
    same = all(ours[number] == theirs[number] for number in ours.keys() & theirs.keys())
    first, second = (each.encode(PROBE, special=False).tolist() for each in (one, other))
    return same and first == second


def widened(params: Params, known: int, vocabulary: int, mesh: Mesh) -> Params:
    """The parameters with rows for `vocabulary` token ids; those from `known` on are the mean of the others.

    A table that has more rows for ids that no text has keeps them.
    """

    def rows(table: jax.Array, axis: int) -> jax.Array:
        kept = jax.lax.slice_in_dim(table, 0, known, axis=axis)
        mean = kept.astype(jnp.float32).mean(axis, keepdims=True).astype(table.dtype)
        size = list(table.shape)
        size[axis] = vocabulary - known
        rest = jax.lax.slice_in_dim(table, min(vocabulary, table.shape[axis]), None, axis=axis)
        return jnp.concatenate([kept, jnp.broadcast_to(mean, size), rest], axis)

    if vocabulary <= known:
        return params
    tables = {("embed", "embedding"): (0, ("vocabulary", "embed"))}
    tables |= {("head", "head"): (1, ("embed", "vocabulary"))} if "head" in params else {}
    for (group, name), (axis, axes) in tables.items():
        table, wide = params[group][name], functools.partial(rows, axis=axis)
        place = sharding.shardings(jax.eval_shape(wide, table), axes, mesh)
        params = params | {group: params[group] | {name: jax.jit(wide, out_shardings=place)(table)}}
    return params


# ---- what lies at a path ----


def described(path: str) -> Described:
    """What is known of the model at a path; read again only where its files have changed."""
    return _described(path, _stamp(path))


def content(path: str) -> str:
    """The hash of what decides the model at a path; raises UserError for a run that hasn't ended."""
    return _content(path, _stamp(path))


def _portable(path: str) -> Portable:
    found = described(path).tokenizer
    if found is None:
        raise UserError(f"{path} has no tokenizer; name one that has, or a tokenizer.json")
    return found


@functools.lru_cache(maxsize=8)
def _codec(path: str, stamp: tuple) -> HuggingFaceCodec:
    return _portable(path).codec()


def _files(path: str) -> list[pathlib.Path]:
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_file():
        return [place]
    if (place / "checkpoints").is_dir():
        said = [place / name for name in ("config.json", "result.json") if (place / name).exists()]
        return [*said, *sorted((place / "checkpoints").glob("*.json"))]
    ours = (".json", ".safetensors", ".model", ".jinja")
    return sorted(file for file in place.glob("*") if file.suffix in ours)


def _stamp(path: str) -> tuple:
    place = files.path(os.path.expanduser(path))
    if files.in_bucket(place):
        objects = place.objects().items()
        return tuple((name, *facts) for name, facts in objects if name.endswith(".json"))
    facts = [(file, file.stat()) for file in _files(path)]
    return tuple((str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in facts)


@functools.lru_cache(maxsize=16)
def _described(path: str, stamp: tuple) -> Described:
    return opening.describe(path)


@functools.lru_cache(maxsize=16)
def _content(path: str, stamp: tuple) -> str:
    described(path)  # says what is wrong with what is no model
    place = files.path(os.path.expanduser(path))
    if place.is_dir() and opening.is_run(place):
        run = load_run(place)
        if run["result"] is None or run["status"] == "diverged":
            ended = "has diverged" if run["result"] else "has not ended: what began it continues it"
            raise UserError(f"model.path: the run {path} {ended}")
        steps = opening.step_of(run) or max(manifest.steps(place / "checkpoints"), default=None)
        if steps is None:
            raise UserError(f"model.path: the run {path} kept no checkpoint (execution.checkpoint.at_end)")
        return f"run {run['identity']}, {steps} steps"
    found = hashlib.sha256()
    for file in _files(path):
        found.update(file.name.encode() if place.is_dir() else b"")
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]
