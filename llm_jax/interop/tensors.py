"""Parameters from a file's tensors and back, one tensor in host memory at a time."""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm_jax.config import UserError
from llm_jax.interop.layouts import Piece, Sizes, Table, plan, sizes_of
from llm_jax.models import Params
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import MeshConfig, make_mesh, shardings

Plan = dict[str, list[Piece]]
Convert = Callable[[str, jax.Array], Any]


class Reader(Protocol):
    """A file of tensors by name."""

    source: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""

    def dtype(self, name: str) -> jnp.dtype:
        """What one tensor's numbers become here."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as floating-point numbers."""


def shapes(reader: Reader, table: Table, config: Transformer) -> Params:
    """What `load` will make of a file, as ShapeDtypeStructs.

    Raises UserError that lists tensors without a use, parameters without a tensor, and shapes that don't fit.
    """
    model = config.build()
    wanted = plan(table, config, model)
    _check(reader, wanted, config)
    dtypes: dict[tuple[str, ...], jnp.dtype] = {}
    for name, pieces in wanted.items():
        dtype = reader.dtype(name)
        for piece in pieces:
            dtypes[piece.path] = jnp.result_type(dtype, dtypes.get(piece.path, dtype))
    leaves = _leaves(jax.eval_shape(model.init, jax.random.key(0)))
    return _tree({path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves})


def load(
    reader: Reader,
    table: Table,
    config: Transformer,
    mesh: Mesh | None = None,
    convert: Convert | None = None,
) -> Params:
    """The parameters of `config` on the mesh (by default one device), each tensor sent there as it is read.

    convert: what becomes of each parameter, by its name, as soon as it is whole. Raises UserError as
    `shapes` does.
    """
    model, sizes, wanted = config.build(), sizes_of(config), shapes(reader, table, config)
    roles = dict(_leaves(model.roles(wanted)))
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    slices: dict[tuple[str, ...], list[tuple[str, Piece]]] = {}
    for name, pieces in plan(table, config, model).items():
        for piece in pieces:
            slices.setdefault(piece.path, []).append((name, piece))
    filled = {}
    for path, leaf in _leaves(wanted):
        axes, dtype = roles[path].axes, leaf.dtype
        place = shardings(leaf, axes, mesh)
        for name, piece in slices[path]:
            part = _sent(reader.read(name), piece, sizes, dtype, axes[len(piece.index) :], mesh)
            if piece.index:
                whole = filled[path] if path in filled else _zeros(leaf.shape, dtype, place)
                part = _put(whole, part, piece.index, place).block_until_ready()
            filled[path] = part
        if convert:
            filled[path] = part = jax.block_until_ready(convert(path[-1], part))
    return _tree(filled)


def save(params: Params, table: Table, config: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for every tensor of the file, made as it is asked for."""
    leaves, sizes = dict(_leaves(params)), sizes_of(config)
    for name, pieces in plan(table, config, config.build()).items():
        pieces = sorted(pieces, key=lambda piece: piece.entry.part)
        parts = [piece.entry.write(np.asarray(leaves[piece.path][piece.index]), sizes) for piece in pieces]
        yield name, np.ascontiguousarray(np.concatenate(parts, axis=pieces[0].entry.axis))


def stored(params: Params) -> str:
    """The type that a file of these parameters has: bfloat16 if most numbers are, else float32."""
    leaves = jax.tree.leaves(params)
    half = sum(leaf.size for leaf in leaves if leaf.dtype == jnp.bfloat16)
    return "bfloat16" if 2 * half > sum(leaf.size for leaf in leaves) else "float32"


@contextlib.contextmanager
def whole(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file or folder, which takes its name when it is complete; else nothing stays.

    Raises UserError where there is one already, or none can be written.
    """
    if place.exists():
        raise UserError(f"{place} exists; give another name")
    partial = place.with_name(f"{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        partial.rename(place)
    except OSError as error:
        raise UserError(f"can't write {place}: {error}") from None
    finally:
        _remove(partial)


def _remove(place: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def _check(reader: Reader, wanted: Plan, config: Transformer) -> None:
    shapes, sizes = reader.shapes(), sizes_of(config)
    missing, strays = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or strays:
        words = [("without a use", strays), ("missing", missing)]
        said = [f"{len(names)} tensors {what}: {_some(names)}" for what, names in words if names]
        raise UserError(f"{reader.source} and its config don't fit: {'; '.join(said)}")
    for name, pieces in wanted.items():
        if shapes[name] != (right := pieces[0].entry.shape(sizes)):
            raise UserError(f"{reader.source}: {name} is {shapes[name]}, and by the config it is {right}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _sent(
    tensor: np.ndarray, piece: Piece, sizes: Sizes, dtype: jnp.dtype, axes: tuple[str | None, ...], mesh: Mesh
) -> jax.Array:
    """A file's tensor on the mesh, spread as its parameter will be; the host needs it no more."""
    array = piece.entry.read(tensor, sizes).astype(dtype, copy=False)
    place = shardings(array, axes, mesh)
    return jax.make_array_from_callback(array.shape, place, lambda at: array[at]).block_until_ready()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), place)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, index: tuple[int, ...], place: NamedSharding) -> jax.Array:
    """`whole` with `part` at `index`, in the same memory: compiled once for all parts of one shape."""
    part = jnp.expand_dims(part, range(len(index)))
    whole = jax.lax.dynamic_update_slice(whole, part, (*index, *[0] * (whole.ndim - len(index))))
    return jax.lax.with_sharding_constraint(whole, place)


def _leaves(tree: Params) -> list[tuple[tuple[str, ...], Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(part.key for part in path), leaf) for path, leaf in flat]


def _tree(leaves: dict[tuple[str, ...], Any]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        inside = tree
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
        inside[path[-1]] = leaf
    return tree
