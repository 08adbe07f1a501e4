"""Parameters from a file's tensors and back, one tensor in host memory at a time."""

import functools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import UserError
from llm_jax.interop.layouts import Piece, Table, plan, sizes_of
from llm_jax.models import Params
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import MeshConfig, make_mesh, shardings

Plan = dict[str, list[Piece]]


class Reader(Protocol):
    """A file of tensors by name."""

    source: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as floating-point numbers."""


def load(
    reader: Reader, table: Table, config: Transformer, dtype: jnp.dtype, mesh: Mesh | None = None
) -> Params:
    """The parameters of `config` on the mesh (by default one device), each slice sent there as it is read.

    Raises UserError that lists tensors without a use, parameters without a tensor, and shapes that don't fit.
    """
    model, sizes = config.build(), sizes_of(config)
    wanted = plan(table, config, model)
    _check(reader, wanted, config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    axes = jax.tree.map(lambda role: role.axes, model.roles(shapes))
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    placed = dict(_leaves(shardings(shapes, axes, mesh)))
    named_axes = dict(_leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    stacks, filled = dict(_leaves(shapes)), {}
    for name, pieces in wanted.items():
        tensor = reader.read(name)
        for piece in pieces:
            part, parts = piece.entry.part
            array = piece.entry.read(np.split(tensor, parts, axis=-1)[part], sizes).astype(dtype)
            inner = named_axes[piece.path][len(piece.index) :]
            there = shardings(array, inner, mesh)
            array = jax.make_array_from_callback(array.shape, there, lambda index, a=array: a[index])
            if piece.index and piece.path not in filled:
                empty = functools.partial(jnp.zeros, stacks[piece.path].shape, dtype)
                filled[piece.path] = jax.jit(empty, out_shardings=placed[piece.path])()
            filled[piece.path] = _put(filled[piece.path], array, piece.index) if piece.index else array
    return _tree(filled)


def save(params: Params, table: Table, config: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for every tensor of the file, made as it is asked for."""
    leaves, sizes = dict(_leaves(params)), sizes_of(config)
    for name, pieces in plan(table, config, config.build()).items():
        pieces = sorted(pieces, key=lambda piece: piece.entry.part)
        parts = [piece.entry.write(np.asarray(leaves[piece.path][piece.index]), sizes) for piece in pieces]
        yield name, np.concatenate(parts, axis=-1) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _check(reader: Reader, wanted: Plan, config: Transformer) -> None:
    shapes, sizes = reader.shapes(), sizes_of(config)
    missing, strays = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or strays:
        words = [("without a use", strays), ("missing", missing)]
        said = [f"{len(names)} tensors {what}: {_some(names)}" for what, names in words if names]
        raise UserError(f"{reader.source} and its config don't fit: {'; '.join(said)}")
    for name, pieces in wanted.items():
        *lead, last = pieces[0].entry.shape(sizes)
        if shapes[name] != (right := (*lead, last * pieces[0].entry.part[1])):
            raise UserError(f"{reader.source}: {name} is {shapes[name]}, and by the config it is {right}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return stack.at[index].set(array)


def _leaves(tree: Params, **kwargs) -> list[tuple[tuple[str, ...], jax.Array]]:
    flat = jax.tree_util.tree_flatten_with_path(tree, **kwargs)[0]
    return [(tuple(part.key for part in path), leaf) for path, leaf in flat]


def _tree(leaves: dict[tuple[str, ...], jax.Array]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        inside = tree
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
        inside[path[-1]] = leaf
    return tree
