"""Opening a model wherever it comes from: a Hugging Face directory, a GGUF file, or the folder of a run."""

import dataclasses
import functools
import json
import os
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import config as configs
from llm_jax import files, links, optimizers
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import Chat, DataConfig, SentencePiece
from llm_jax.inference.quantising import quantised
from llm_jax.interop import huggingface
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.tensors import Convert
from llm_jax.interop.tokenizer import Portable
from llm_jax.models import ModelConfig, Params, lora  # noqa: F401 (a kind of models)
from llm_jax.optimizers import Optimizer
from llm_jax.records import check_tokenizer, load_run
from llm_jax.sharding import MeshConfig, make_mesh, shardings

TOKENIZER = "tokenizer"  # the folder of a run's tokenizer where nothing else may have it some day
Dtype = Literal["float32", "bfloat16", "int8"]


class Opened(NamedTuple):
    """A model to be talked to.

    tokenizer: None where the files have none. context: the longest text it is made for, if that is known.
    mesh: where its parameters lie, if not on one device. first: the token that stands before a text in an
    evaluation, where that isn't the tokenizer's to say.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Portable | None
    context: int | None
    mesh: Mesh | None = None
    first: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text from its beginning; raises UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer: give token ids")
        return self.tokenizer.encode(text)

    def check(self, ids: np.ndarray) -> None:
        """Raises UserError for ids [B, T] that the model can't read."""
        if ids.size == 0:
            raise UserError("there is nothing to read: give at least one token")
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"ids are {ids.dtype}; they are integers")
        vocabulary = self.config.vocabulary
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise UserError(f"ids lie in 0 .. {vocabulary - 1}, and these in {ids.min()} .. {ids.max()}")
        if self.context is not None and (size := ids.shape[1]) > self.context:
            raise UserError(
                f"the text has {size:,} tokens, and the model's context is {self.context:,}: shorten it"
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stops if self.tokenizer else ()


class Described(NamedTuple):
    """A model that is known, and whose parameters are still where they are.

    read(mesh=None, convert=None) reads them; convert(name, parameter): what becomes of each.
    """

    name: str
    config: ModelConfig
    tokenizer: Portable | None
    context: int | None
    read: Callable[..., Params]


def open_model(path: str, dtype: Dtype | None = None, mesh: Mesh | None = None) -> Opened:
    """The model at `path`, computing in `dtype` (by default as it is stored), its parameters on the mesh.

    int8 is for matrices only, computing stays. Each parameter is converted as soon as it is read. Raises
    UserError for what is no model, and as its reader does for one that is damaged.
    """
    name, config, tokenizer, context, read = describe(path)
    params = read(mesh, dtype and functools.partial(_converted, dtype))
    if dtype not in (None, "int8"):
        config = dataclasses.replace(config, dtype=dtype)
    return Opened(name, config, params, tokenizer, context, mesh)


def describe(path: str | pathlib.Path) -> Described:
    """What is known of the model at `path` before its parameters are read."""
    place = files.path(os.path.expanduser(path))
    if files.in_bucket(place):
        if not (place / "config.json").is_file() or not is_run(place):
            raise UserError(f"no run at {str(path)!r}: of a bucket, runs alone can be opened")
        return _of_run(place)
    if place.is_file() and place.suffix == ".gguf":
        from llm_jax.interop import gguf

        return _portable(place, gguf)
    if (place / "config.json").is_file():
        return _of_run(place) if is_run(place) else _portable(place, huggingface)
    if place.is_file() and place.suffix in huggingface.PICKLED:
        raise huggingface.refused(place)
    raise UserError(
        f"no model at {str(path)!r}: give a directory in Hugging Face's format, a .gguf file or a run's "
        "folder"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _converted(dtype: Dtype, name: str, leaf: jax.Array) -> Any:
    """The parameter `name` as it is used."""
    return quantised(name, leaf) if dtype == "int8" else leaf.astype(dtype)


def _converted_by_leaf(convert: Convert, params: Params) -> Params:
    """All of them, in whose place no others stay: they are nobody else's."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    params.clear()
    found = []
    while leaves:
        path, leaf = leaves.pop(0)
        found.append(jax.block_until_ready(convert(path[-1].key, leaf)))
    return tree.unflatten(found)


def _portable(place: pathlib.Path, reader: types.ModuleType) -> Described:
    config, read, tokenizer = reader.describe(place)
    if tokenizer and (beyond := tokenizer.beyond(config.vocabulary)):
        raise UserError(
            f"{place}: the tokenizer has {beyond:,} tokens beyond the model's vocabulary of "
            f"{config.vocabulary:,}: put the one there that it was trained with"
        )
    context = tokenizer.context if tokenizer else reader.context(place)
    return Described(place.resolve().name, config, tokenizer, context_of(config, context), read)


def context_of(config: ModelConfig, context: int | None) -> int | None:
    """How long a text may be: the context, where learned positions don't end it earlier."""
    learned = getattr(config.positions, "length", None)
    return min(filter(None, (context, learned)), default=None)


def is_run(place: pathlib.Path) -> bool:
    """Whether a folder with a config.json is that of a run."""
    try:
        return "identity" in json.loads((place / "config.json").read_text())
    except ValueError:
        return False  # the other reader says what is wrong with it


def _of_run(place: pathlib.Path) -> Described:
    """A run's newest parameters, or its best if it kept them; merged if they were trained beside others."""
    from llm_jax.inference import pretrained  # noqa: F401 (kinds that a run may have, which open models)

    facts = load_run(place)
    data = configs.from_json(DataConfig, facts["config"]["data"], "data")
    if "model" in facts:  # with what it took from elsewhere, which may be gone
        config = configs.from_json(ModelConfig, facts["model"], "model")
    else:
        config = configs.from_json(ModelConfig, facts["config"]["model"], "model").resolve(data)
    if not hasattr(data, "tokenizer") or config.build().decode is None:
        raise UserError(f"{place}: a {config.kind} on {data.kind} generates no text")
    merged = config.merged
    tokenizer, context = _tokenizer_of_run(place, facts, data), context_of(merged, data.sequence_length)
    tokenizer = dataclasses.replace(tokenizer, context=context)
    optimizer = configs.from_json(Optimizer, facts["config"]["optimizer"], "optimizer")

    def read(mesh: Mesh | None = None, convert: Convert | None = None) -> Params:
        params = _params_of_run(place, config, optimizers.structure(optimizer), step_of(facts), mesh)
        return _converted_by_leaf(convert, params) if convert else params

    return Described(place.resolve().name, merged, tokenizer, context, read)


def _tokenizer_of_run(place: pathlib.Path, facts: Mapping[str, Any], data: Any) -> Portable:
    """The tokenizer beside a run's records, or else what its data says."""
    if (place / TOKENIZER).is_dir():
        return tokenizers.read(place / TOKENIZER, None)
    trained = isinstance(data.tokenizer, SentencePiece)
    codec = data.open().codec if trained else data.tokenizer.open(None, "")
    now = {"fingerprint": codec.fingerprint, "library": codec.library}
    before = facts["data"].get("tokenizer", {})
    check_tokenizer(place, facts, {"data": {"tokenizer": before | now} if before else {}})
    return tokenizer_of(data, codec)


def tokenizer_of(data: Any, codec: Any) -> Portable:
    """The tokenizer of a model trained on `data`; texts begin with the end of the one before, as there."""
    tokenizer = tokenizers.of(codec)
    if isinstance(data, Chat):
        tokenizer = tokenizers.with_turns(tokenizer, data.written)
    return tokenizer.begun(codec.eot)


def step_of(facts: Mapping[str, Any]) -> int | None:
    """The step with which a run is opened, by its record; None: the newest that is sound."""
    return ((facts["result"] or {}).get("best") or {}).get("step")


def _params_of_run(
    place: pathlib.Path, config: ModelConfig, optimizer: Optimizer, step: int | None, mesh: Mesh | None
) -> Params:
    model = config.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    roles = model.roles(shapes)
    axes = jax.tree.map(lambda role: role.axes, roles)
    places = shardings(shapes, axes, mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1]))
    target = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=at), shapes, places
    )
    frozen, trained = model.split(target)
    roles = model.split(roles)[1]
    part = _published(jax.eval_shape(lambda params: optimizers.init(optimizer, roles, params), trained))
    checkpoints = Checkpoints(place / "checkpoints")
    params = checkpoints.restore_params(trained, part, step)
    if frozen:
        params |= checkpoints.restore_params(frozen, "frozen", step)
    return model.merge(params)


def _published(optimizer_state: Any) -> str:
    """Where in a run's state the parameters to use are: the average where the optimizer keeps one."""
    flat = jax.tree_util.tree_leaves_with_path(optimizer_state, is_leaf=_is_averaged)
    for path, link in flat:
        if _is_averaged(link):
            return f"optimizer/{jax.tree_util.keystr(path, simple=True, separator='/')}/average"
    return "trained"


def _is_averaged(link: Any) -> bool:
    return isinstance(link, links.Averaged)
