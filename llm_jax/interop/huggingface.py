"""Models in Hugging Face's format: `config.json`, safetensors in one file or in shards, tokenizer files.

config, params, tokenizer = huggingface.load("path/to/Qwen3-0.6B")
huggingface.save("out", config, params, tokenizer)      # opens in transformers
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from llm_jax.config import UserError
from llm_jax.interop import families, tensors
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.features import Json
from llm_jax.interop.tokenizer import Portable
from llm_jax.models import Params
from llm_jax.models.positions import Learned
from llm_jax.models.transformer import Transformer

PICKLED = (".bin", ".pt", ".pth")
DTYPES = {"BF16": jnp.bfloat16, "F32": jnp.float32, "F16": jnp.float32, "F64": jnp.float32}


class Loaded(NamedTuple):
    """A model from a file; tokenizer is None where there was none."""

    config: Transformer
    params: Params
    tokenizer: Portable | None


class Described(NamedTuple):
    """A model in a file whose parameters are still there: read(mesh, convert) reads them (`tensors.load`)."""

    config: Transformer
    read: Callable[..., Params]
    tokenizer: Portable | None

    def load(self, mesh: Mesh | None) -> Loaded:
        return Loaded(self.config, self.read(mesh), self.tokenizer)


def load(directory: str | pathlib.Path, mesh: Mesh | None = None) -> Loaded:
    """The model in a directory, its parameters sent to the mesh (by default one device) tensor by tensor.

    bfloat16 stays, tensor by tensor, and it is computed in what most numbers are; other types become float32.
    Raises UserError for an architecture that isn't known, a damaged file, and tensors that don't fit the
    config or are left over.
    """
    return describe(directory).load(mesh)


def describe(directory: str | pathlib.Path) -> Described:
    """What `load` finds, but for the parameters."""
    folder = pathlib.Path(os.path.expanduser(directory))
    facts = _facts(folder)
    family = families.of(facts)
    config, shards = family.read(facts), Shards(folder, family)
    if config.tied and (head := family.tensors["head/head"].name) in shards.where:
        embedding = family.tensors["embed/embedding"].name
        if np.array_equal(shards.read(head), shards.read(embedding)):
            shards.where.pop(head)
        else:  # it was trained by itself, whatever config.json says; transformers takes it too
            config = dataclasses.replace(config, tied=False)
    dtype = tensors.stored(tensors.shapes(shards, family.tensors, config))
    return Described(
        dataclasses.replace(config, dtype=dtype),
        functools.partial(tensors.load, shards, family.tensors, config),
        tokenizers.read(folder, context(folder)),
    )


def context(directory: str | pathlib.Path) -> int | None:
    """How many tokens the model in a directory was made for, if its config says so."""
    folder = pathlib.Path(os.path.expanduser(directory))
    facts = _facts(folder)
    key = "max_position_embeddings" if facts.get("max_position_embeddings") else "n_positions"
    if not isinstance(facts.get(key), int | None):
        raise UserError(f"{folder / 'config.json'}: {key} is {facts[key]!r}, and it is a number of tokens")
    return facts.get(key)


def _facts(folder: pathlib.Path) -> Json:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; give a directory in Hugging Face's format")
    return tokenizers.read_json(folder / "config.json")


def save(
    directory: str | pathlib.Path,
    config: Transformer,
    params: Params,
    tokenizer: Portable | None = None,
    family: str | None = None,
    shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    context: int | None = None,
) -> None:
    """Writes a directory that `load` and transformers read; it must not exist.

    tokenizer: a `Portable`, or a codec of `data/tokenizers.py`. family: by default the first that can be this
    model. dtype: float32, bfloat16 or float16, by default as they are. context: how many tokens the model was
    made for, if the tokenizer doesn't say. Raises UserError if no family can be the model.
    """
    chosen, facts = families.fitting(config, family)
    name = dtype or tensors.stored(params)
    tokenizer = None if tokenizer is None else tokenizers.of(tokenizer)
    context = (tokenizer and tokenizer.context) or context or getattr(config.positions, "length", 2048)
    facts |= {"dtype": name, "torch_dtype": name, "use_cache": True}
    if not isinstance(config.positions, Learned):
        facts["max_position_embeddings"] = context
    facts |= tokenizers.ids(tokenizer)
    named = tensors.save(params, chosen.tensors, config)
    with tensors.whole(pathlib.Path(os.path.expanduser(directory))) as folder:
        folder.mkdir()
        cast = ((path, array.astype(dtype) if dtype else array) for path, array in named)
        _write_shards(folder, cast, shard_bytes)
        if tokenizer:
            tokenizers.write(tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(facts, indent=2))


class Shards:
    """The safetensors of a directory as one file: model.safetensors, else an index's shards, else all."""

    def __init__(self, folder: pathlib.Path, family: families.Family) -> None:
        self.source = str(folder)
        self.where: dict[str, tuple[str, pathlib.Path]] = {}  # our name -> (name in the file, file)
        self.files = {}
        wanted = tuple({entry.name.split("{")[0] for entry in family.tensors.values()})
        for path in _files_of(folder):
            try:
                self.files[path] = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file: {error}") from None
            for name in self.files[path].offset_keys():
                if re.fullmatch(family.ignored, name) or re.fullmatch(family.ignored, f".{name}"):
                    continue
                whole = name if name.startswith(wanted) else family.prefix + name
                ours = whole if whole.startswith(wanted) else name
                if ours in self.where:
                    raise UserError(f"{folder}: {name} is in {self.where[ours][1].name} and in {path.name}")
                self.where[ours] = (name, path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._slice(name).get_shape()) for name in self.where}

    def dtype(self, name: str) -> jnp.dtype:
        """bfloat16 if the tensor is, else float32."""
        if (kind := self._slice(name).get_dtype()) not in DTYPES:
            raise UserError(f"{self.source}: {name} is {kind}; {', '.join(DTYPES)} are read")
        return DTYPES[kind]

    def read(self, name: str) -> np.ndarray:
        inside, path = self.where[name]
        return self.files[path].get_tensor(inside)

    def _slice(self, name: str):
        inside, path = self.where[name]
        return self.files[path].get_slice(inside)


def _files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a directory's weights."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if (index := folder / "model.safetensors.index.json").is_file():
        where = tokenizers.read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise UserError(f"{index}: not an index of shards: no weight_map")
        names = sorted({str(name) for name in where.values()})
        if missing := [n for n in names if pathlib.Path(n).name != n or not (folder / n).is_file()]:
            raise UserError(f"{index} names {', '.join(missing)}, not in {folder}")
        return [folder / name for name in names]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickled = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLED]
    raise refused(pickled[0]) if pickled else UserError(f"{folder}: no weights here: no *.safetensors")


def refused(pickled: pathlib.Path) -> UserError:
    """Why weights in a pickle aren't read."""
    why = "is pickled, and a pickle runs whatever code it holds: weights are read from *.safetensors only"
    return UserError(f"{pickled} {why}")


def _write_shards(folder: pathlib.Path, named: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most about `shard_bytes` with their index."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        safetensors.numpy.save_file(held, path, metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, array in named:
        if held and sum(one.nbytes for one in held.values()) + array.nbytes > shard_bytes:
            flush()
        held[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    where = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
