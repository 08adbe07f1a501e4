"""Opening a model wherever it comes from: a Hugging Face directory, a GGUF file, or the folder of a run."""

import dataclasses
import json
import os
import pathlib
import types
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import config as configs
from llm_jax import links, optimizers
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import Chat, DataConfig, SentencePiece
from llm_jax.inference.quantising import quantise
from llm_jax.interop import huggingface
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.tokenizer import Portable
from llm_jax.models import ModelConfig, Params
from llm_jax.optimizers import Optimizer
from llm_jax.records import check_tokenizer, load_run
from llm_jax.sharding import MeshConfig, make_mesh, shardings

Dtype = Literal["float32", "bfloat16", "int8"]


class Opened(NamedTuple):
    """A model to be talked to.

    tokenizer: None where the files have none. context: the longest text it is made for, if that is known.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Portable | None
    context: int | None

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


def open_model(path: str, dtype: Dtype | None = None, mesh: Mesh | None = None) -> Opened:
    """The model at `path`, computing in `dtype` (by default as it is stored), its parameters on the mesh.

    Raises UserError for what is no model, and as its reader does for one that is damaged.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_file() and place.suffix == ".gguf":
        from llm_jax.interop import gguf

        opened = _portable(place, gguf, mesh)
    elif (place / "config.json").is_file():
        opened = _of_run(place, mesh) if _is_run(place) else _portable(place, huggingface, mesh)
    elif place.is_file() and place.suffix in huggingface.PICKLED:
        raise huggingface.refused(place)
    else:
        raise UserError(
            f"no model at {path!r}: give a directory in Hugging Face's format, a .gguf file or a run's folder"
        )
    return opened if dtype is None else cast(opened, dtype)


def cast(opened: Opened, dtype: Dtype) -> Opened:
    """The same model with parameters and computing in `dtype`; int8 is for matrices only, computing stays."""
    if dtype == "int8":
        return opened._replace(params=jax.jit(quantise)(opened.params))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), opened.params)
    return opened._replace(params=params, config=dataclasses.replace(opened.config, dtype=dtype))


def _portable(place: pathlib.Path, reader: types.ModuleType, mesh: Mesh | None) -> Opened:
    config, params, tokenizer = reader.load(place, mesh)
    context = tokenizer.context if tokenizer else reader.context(place)
    return Opened(place.name, config, params, tokenizer, _limit(config, context))


def _limit(config: ModelConfig, context: int | None) -> int | None:
    """The context, where learned positions end it earlier."""
    learned = getattr(config.positions, "length", None)
    return min(filter(None, (context, learned)), default=None)


def _is_run(place: pathlib.Path) -> bool:
    try:
        return "identity" in json.loads((place / "config.json").read_text())
    except ValueError:
        return False  # the other reader says what is wrong with it


def _of_run(place: pathlib.Path, mesh: Mesh | None) -> Opened:
    """A run's newest parameters; each text begins with the end of the one before, as in training."""
    facts = load_run(place)
    data = configs.from_json(DataConfig, facts["config"]["data"], "data")
    config = configs.from_json(ModelConfig, facts["config"]["model"], "model").resolve(data)
    if not hasattr(data, "tokenizer") or config.build().decode is None:
        raise UserError(f"{place}: a {config.kind} on {data.kind} generates no text")
    trained = isinstance(data.tokenizer, SentencePiece)
    codec = data.open().codec if trained else data.tokenizer.open(None, "")
    tokenizer = tokenizers.of(codec)
    if isinstance(data, Chat):
        tokenizer = tokenizers.with_turns(tokenizer, data.written)
    now = {"fingerprint": codec.fingerprint, "library": codec.library}
    before = facts["data"].get("tokenizer", {})
    check_tokenizer(place, facts, {"data": {"tokenizer": before | now} if before else {}})
    model = config.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    roles = model.roles(shapes)
    axes = jax.tree.map(lambda role: role.axes, roles)
    places = shardings(shapes, axes, mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1]))
    target = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=at), shapes, places
    )
    optimizer = optimizers.structure(configs.from_json(Optimizer, facts["config"]["optimizer"], "optimizer"))
    part = _published(jax.eval_shape(lambda params: optimizers.init(optimizer, roles, params), shapes))
    params = Checkpoints(place / "checkpoints").restore_params(target, part)
    context = _limit(config, data.sequence_length)
    tokenizer = dataclasses.replace(tokenizer.begun(codec.eot), context=context)
    return Opened(place.name, config, params, tokenizer, context)


def _published(optimizer_state: Any) -> str:
    """Where in a run's state the parameters to use are: the average where the optimizer keeps one."""
    flat = jax.tree_util.tree_leaves_with_path(optimizer_state, is_leaf=_is_averaged)
    for path, link in flat:
        if _is_averaged(link):
            return f"optimizer/{jax.tree_util.keystr(path, simple=True, separator='/')}/average"
    return "trained"


def _is_averaged(link: Any) -> bool:
    return isinstance(link, links.Averaged)
