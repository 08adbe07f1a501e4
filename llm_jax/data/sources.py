"""What the trainer sees of any data: a config that opens a `Source`, whose rows are a pure function.

A source of your own is one small class and one config:

    class Squares(Source):
        def __init__(self, config):
            row = jax.ShapeDtypeStruct((config.batch_size,), np.float32)
            self.spec = {"x": row, "y": row}

        def rows(self, seed, indices):
            x = np.float32([np.random.default_rng((seed, index)).random() for index in indices])
            return {"x": x, "y": x**2}

    @dataclasses.dataclass(frozen=True)
    class SquaresConfig(DataConfig, kind="squares"):
        batch_size: int = 8
        vocabulary: ClassVar[int] = 0

        def open(self):
            return Squares(self)

Rows are made while the device is at the step before.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.config import Tagged

Batch = dict[str, np.ndarray]


class DataConfig(Tagged):
    """Root of the data configs (`run.data`); a member is a frozen dataclass with these attributes."""

    batch_size: int  # rows of one step
    vocabulary: int  # number of token ids (0 where rows hold no tokens)

    @property
    def tokens_per_step(self) -> int:
        """What one step adds to D: here one per row; text counts batch_size * sequence_length."""
        return self.batch_size

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch of one step, as its source has it; a config that knows it opens nothing."""
        return self.open().spec

    def open(self) -> "Source":
        """The source of rows; prepares and caches what is needed. Raises UserError for unusable data."""
        raise NotImplementedError


class Source:
    """Rows of training data by global index: row r of step s has the index s * batch_size + r."""

    spec: dict[str, jax.ShapeDtypeStruct]  # the global batch of one step
    available_tokens: int | None = None  # what may be trained on without repeating (None: no limit)
    notes: Sequence[str] = ()  # lines to tell when a run begins
    record: Mapping[str, Any] = types.MappingProxyType({})  # JSON facts for the run's record: hashes, counts

    def rows(self, seed: int, indices: np.ndarray) -> Batch:
        """Arrays whose leading axis runs over `indices`; a pure function, so any step can be asked for."""
        raise NotImplementedError

    def held_out(self) -> "HeldOut | None":
        """The documents that are never trained on (None: this data has none)."""
        return None

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been seen after `rows` global rows."""
        return {}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A fixed list of documents that every run on this data is scored on, in full: next-token batches.

    `rows(indices)` gives a dict like `Source.rows`, for range(count); further rows have mask 0 and fill
    batches up. Scoring reads `tokens` and `targets`, float32 `mask` [B, T], and int32 `document` [B, T],
    which stands beside the spec: which of range(documents) each target belongs to, so that losses can be
    summed by document. sources: name and number of documents of each part of a mixture, in their order;
    losses are given for each too. Data of another form has no held-out documents (`Source.held_out`).
    """

    rows: Callable[[np.ndarray], Batch]
    count: int
    tokens: int  # targets in all, each an end of a document too
    bytes: int  # of UTF-8 text behind them (0: none)
    documents: int
    sources: tuple[tuple[str, int], ...] = ()
