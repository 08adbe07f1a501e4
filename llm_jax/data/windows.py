"""The arithmetic of rows: whose turn it is, which window is next, and what stands in a window.

All of it is vectorised over rows and needs nothing but their numbers.
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.sources import Batch
from llm_jax.data.store import Store

BLOCK = 1000  # rows in which every source of a mixture has exactly its share


def turns(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn each of BLOCK rows is, and the how-manieth of its own: int64 [BLOCK] each.

    A stride near the golden ratio spreads every source evenly, so that each batch has nearly its shares.
    Raises UserError for a weight below half a thousandth of all.
    """
    ends = np.round(np.cumsum(weights) / np.sum(weights) * BLOCK).astype(int)
    if np.diff(ends, prepend=0).min() < 1:
        raise UserError(
            f"data.corpus.parts: weights are rounded to thousandths, {min(weights)} is too small a share"
        )
    which = np.searchsorted(ends, np.arange(BLOCK) * 617 % BLOCK, side="right")
    ranks = np.zeros(BLOCK, np.int64)
    for number in range(len(weights)):
        ranks[which == number] = np.arange((which == number).sum())
    return which, ranks


def mix(value: np.ndarray) -> np.ndarray:
    """uint64 [n] -> uint64 [n], a bijection without visible pattern (splitmix64; Steele et al., 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around silently
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def shuffled(index: np.ndarray, count: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where the permutation `key` of range(count) takes `index`, for each entry [n] without the others.

    A Feistel network of six rounds permutes the cells of a rectangle that just holds `count`; a cell beyond
    it walks on until it falls inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    Unlike a stored permutation it takes no memory, unlike numpy's it is the same in every version.
    """
    high = np.ceil(np.sqrt(count)).astype(np.uint64)
    low = -(-count // high.astype(np.int64)).astype(np.uint64)
    out, key, walking = index.astype(np.uint64), key.astype(np.uint64), np.arange(len(index))
    while len(walking):
        a, b, secret = high[walking], low[walking], key[walking]
        left, right = np.divmod(out[walking], b)
        for _ in range(3):
            left = (left + mix(secret ^ right) % a) % a
            secret = mix(secret)
            right = (right + mix(secret ^ left) % b) % b
            secret = mix(secret)
        out[walking] = left * b + right
        walking = walking[out[walking] >= count[walking]]
    return out.astype(np.int64)


class Stream:
    """Documents of a store one after the other, and a closing eot, as one sequence of tokens."""

    def __init__(self, store: Store, documents: np.ndarray, closing: int = 1) -> None:
        # Any document begins with the eot that closes the stream; more of them fill a last window up.
        order = np.concatenate([documents, np.repeat(documents[:1], closing)])
        lengths = np.concatenate([store.lengths[documents], np.ones(closing, np.int64)])
        self.tokens, self.begins = store.tokens, store.starts[order]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.documents = len(documents)
        self.bytes = int(store.sizes_bytes[documents].sum())
        self.size = int(store.lengths[documents].sum())  # targets in all

    def windows(self, first: np.ndarray, length: int, fields: Sequence[str]) -> Batch:
        """int32 tokens, targets and `fields` [rows, length] of the windows that begin at `first` [rows].

        A row is made of pieces of documents, so each array is a value by piece, repeated over the piece, plus
        at most a count. The fields are `segments` (the piece's number, from 1), `positions` (from 0 in each
        piece) and `document` (its number in this stream).
        """
        rows, span = len(first), length + 1
        head = np.searchsorted(self.offsets, first, "right") - 1
        pieces = np.searchsorted(self.offsets, first + length, "right") - head
        row = np.repeat(np.arange(rows), pieces)
        rank = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        document = head[row] + rank
        begin = np.maximum(self.offsets[document], first[row])
        size = np.minimum(self.offsets[document + 1], first[row] + span) - begin
        place = np.cumsum(size) - size  # where each piece begins in the flat output
        count = np.arange(rows * span)

        in_store = self.begins[document] + begin - self.offsets[document]
        tokens = self.tokens[np.repeat(in_store - place, size) + count].astype(np.int32)
        flat = {"tokens": tokens, "targets": tokens}
        if "segments" in fields:
            flat["segments"] = np.repeat((rank + 1).astype(np.int32), size)
        if "positions" in fields:
            flat["positions"] = count.astype(np.int32) - np.repeat(place.astype(np.int32), size)
        if "document" in fields:
            flat["document"] = np.repeat(np.minimum(document, self.documents - 1).astype(np.int32), size)
        shift = {"targets": slice(1, None)}
        return {
            name: value.reshape(rows, span)[:, shift.get(name, slice(0, -1))] for name, value in flat.items()
        }
