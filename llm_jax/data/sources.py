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
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
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

    def open(self) -> "Source":
        """The source of rows; prepares and caches what is needed. Raises UserError for unusable data."""
        raise NotImplementedError


class Source:
    """Rows of training data by global index: row r of step s has the index s * batch_size + r."""

    spec: dict[str, jax.ShapeDtypeStruct]  # the global batch of one step
    available_tokens: int | None = None  # what may be trained on without repeating (None: no limit)

    def rows(self, seed: int, indices: np.ndarray) -> Batch:
        """Arrays whose leading axis runs over `indices`; a pure function, so any step can be asked for."""
        raise NotImplementedError

    def held_out(self) -> "HeldOut | None":
        """The documents that are never trained on (None: this data has none)."""
        return None

    @property
    def record(self) -> dict[str, Any]:
        """JSON facts for the run's record: hashes and counts."""
        return {}

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been seen after `rows` global rows."""
        return {}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A fixed list of documents that every run on this data is scored on, in full.

    `batches(batch_size)` yields dicts like `Source.spec` of exactly `batch_size` rows, the last one filled
    up with rows of mask 0. Where `documents` is given, a batch also has int32 `document` [B, T]: which
    document each target belongs to, so that losses can be summed by document.
    """

    batches: Callable[[int], Iterator[Batch]]
    tokens: int  # targets in all
    bytes: int | None = None  # of UTF-8 text behind them
    documents: int | None = None

    def summary(self, nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        """Loss and bits per byte from sums by document, with standard errors.

        nats, tokens: [documents], the summed loss and the number of targets of each document. The loss is a
        ratio of two sums, so its error is that of the residuals nats - loss * tokens over documents
        (Cochran, Sampling Techniques, 1977, section 2.11).
        """
        nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
        if round(tokens.sum()) != self.tokens:
            raise ValueError(f"{tokens.sum():.0f} targets were scored, not all {self.tokens}")
        loss = nats.sum() / tokens.sum()
        count = len(nats)
        spread = np.sum((nats - loss * tokens) ** 2) * count / max(count - 1, 1)
        error = math.sqrt(spread) / tokens.sum() if count > 1 else math.nan
        out = {"loss": loss, "loss_standard_error": error}
        if self.bytes:
            per_byte = tokens.sum() / self.bytes / math.log(2)
            out |= {"bits_per_byte": loss * per_byte, "bits_per_byte_standard_error": error * per_byte}
        return {name: float(value) for name, value in out.items()}
