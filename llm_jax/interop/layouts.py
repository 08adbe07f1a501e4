"""How a tensor lies in a file and how it lies here: one pattern, read both ways.

"(H K) D -> D H K" takes a matrix of H*K rows and D columns apart and turns it to [D, H, K]. Letters are the
shape key of `models/__init__.py` (X: an expert's F, k: K/2); a number is itself. A table gives each
parameter, by the last two parts of its path, its name in the file and its pattern:

    "mixer/query": Entry("model.layers.{layer}.self_attn.q_proj.weight", "(H K) D -> D H K")
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from llm_jax.config import UserError
from llm_jax.models import Model
from llm_jax.models.transformer import Transformer

Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a parameter stands in a file.

    In the name, {layer} and {expert} are numbers: such a tensor is one slice of the stacked parameter. part
    (i, n): it is the i-th of n equal parts of the tensor along `axis`. more: how much more than here is
    written there.
    """

    name: str
    pattern: str
    part: tuple[int, int] = (0, 1)
    axis: int = -1
    more: float = 0.0

    def sides(self) -> tuple[list[list[str]], list[list[str]]]:
        """The groups of letters in the file and here."""
        there, _, here = self.pattern.partition("->")
        return _groups(there), _groups(here or there)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape of the whole tensor in the file."""
        shape = list(_shape(self.sides()[0], sizes))
        shape[self.axis] *= self.part[1]
        return tuple(shape)

    def read(self, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The parameter in a file's tensor."""
        index, parts = self.part
        array = np.split(tensor, parts, self.axis)[index]
        return _rearrange(array - np.float32(self.more) if self.more else array, *self.sides(), sizes)

    def write(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The inverse of `read`, for this part."""
        return _rearrange(array + np.float32(self.more) if self.more else array, *self.sides()[::-1], sizes)


Table = Mapping[str, Entry]


class Piece(NamedTuple):
    """A parameter, or at `index` a slice of it, that a tensor of a file is (a part of)."""

    path: tuple[str, ...]
    index: tuple[int, ...]
    entry: Entry


def sizes_of(config: Transformer) -> Sizes:
    """What the letters of patterns stand for."""
    K = config.size_of_head
    sizes = {"D": config.width, "H": config.heads, "G": config.key_value_heads, "K": K, "k": K // 2}
    sizes |= {"F": config.size_of_mlp, "V": config.vocabulary, "T": getattr(config.positions, "length", 0)}
    return sizes | ({"E": config.experts.count, "X": config.size_of_expert} if config.experts else {})


def plan(table: Table, config: Transformer, model: Model) -> dict[str, list[Piece]]:
    """For each tensor of the file what it holds; raises UserError for a parameter without an entry."""
    found: dict[str, list[Piece]] = {}
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        names = tuple(part.key for part in path)
        if (entry := table.get("/".join(names[-2:]))) is None:
            raise UserError(f"this family has no place for the parameter {'/'.join(names)}")
        for repeat in range(leaf.shape[0] if "{layer}" in entry.name else 1):
            for expert in range(config.experts.count if "{expert}" in entry.name else 1):
                where = {"layer": _layer(names, repeat, config), "expert": expert}
                index = [(repeat, "{layer}"), (expert, "{expert}")]
                index = tuple(number for number, key in index if key in entry.name)
                found.setdefault(entry.name.format(**where), []).append(Piece(names, index, entry))
    return found


def _layer(names: tuple[str, ...], repeat: int, config: Transformer) -> int:
    """The layer that the `repeat`-th block of a stack is; 0 outside the blocks."""
    if names[0] not in ("body", "tail"):
        return 0
    first = repeat if names[0] == "body" else config.layers // config.period
    return first * config.period + int(names[1])


def _groups(text: str) -> list[list[str]]:
    groups: list[list[str]] = []
    inside = False
    for sign in text.replace("(", " ( ").replace(")", " ) ").split():
        if sign in "()":
            inside = sign == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(sign)
        else:
            groups.append([sign])
    return groups


def _size(letter: str, sizes: Sizes) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def _shape(groups: list[list[str]], sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(_size(letter, sizes) for letter in group) for group in groups)


def _rearrange(
    array: np.ndarray, before: list[list[str]], after: list[list[str]], sizes: Sizes
) -> np.ndarray:
    first, last = (list(itertools.chain.from_iterable(side)) for side in (before, after))
    apart = array.reshape([_size(letter, sizes) for letter in first])
    return apart.transpose([first.index(letter) for letter in last]).reshape(_shape(after, sizes))
