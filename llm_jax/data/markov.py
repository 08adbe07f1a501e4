"""A synthetic corpus whose entropy is known exactly, so that a fitted irreducible loss can be checked.

Symbols follow a stationary Markov chain; after each symbol the document ends with probability 1/mean_length.
The next symbol's logits are a sum over suffixes of the context, so that each longer one adds detail and
larger models find more to learn.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.corpora import Corpus
from llm_jax.values import check_least

_ALPHABET = np.frombuffer((string.ascii_letters + string.digits + string.punctuation).encode(), np.uint8)
_BLOCK_DOCUMENTS = 1024  # generated together; more blocks extend the corpus, and change nothing before


@dataclasses.dataclass(frozen=True)
class Markov(Corpus, kind="markov"):
    """Documents of `states` printable characters: with the bytes tokenizer each symbol is one token.

    A context is the last `order` symbols, as a number in base `states` whose last digit is the latest.
    """

    states: int = 32
    order: int = 2
    sharpness: float = 1.0  # standard deviation of the logits that each suffix adds
    documents_count: int = 16384
    mean_length: int = 256
    seed: int = 0

    def validate(self) -> None:
        if not 2 <= self.states <= len(_ALPHABET):
            raise UserError(f"data.corpus.states is {self.states}; it lies in 2 .. {len(_ALPHABET)}")
        if not (self.order >= 1 and self.states**self.order <= 1 << 20):
            raise UserError(
                f"data.corpus.order is {self.order}; it is at least 1, and states**order at most 2**20"
            )
        check_least(self, "data.corpus.", ("sharpness",), documents_count=2, mean_length=2, seed=0)
        if self.mean_length > 1 << 20:
            raise UserError(f"data.corpus.mean_length is {self.mean_length}; it is at most 2**20")

    @functools.cached_property
    def transitions(self) -> np.ndarray:
        """Probability of each next symbol after each context, float64 [states**order, states]."""
        generator = np.random.default_rng([self.seed, 0])
        contexts = np.arange(self.states**self.order)
        logits = np.zeros((len(contexts), self.states))
        for length in range(self.order + 1):
            detail = generator.normal(0, self.sharpness, (self.states**length, self.states))
            logits += detail[contexts % self.states**length]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    @functools.cached_property
    def stationary(self) -> np.ndarray:
        """The long-run share of each context, float64 [states**order]."""
        share = np.full(len(self.transitions), 1 / len(self.transitions))
        while True:
            following = (share[:, None] * self.transitions).reshape(self.states, -1).sum(0)
            if np.abs(following - share).sum() < 1e-14:
                return following / following.sum()
            share = following

    def entropy(self, sequence_length: int | None = None) -> float:
        """Exact mean loss of the best predictor, in nats per token of the bytes tokenizer, eots counted.

        In windows of `sequence_length` tokens the first targets see fewer symbols than `order`, which costs a
        little; None stands for unlimited windows.
        """
        end, known = 1 / self.mean_length, self._entropies()
        ending = -end * math.log(end) - (1 - end) * math.log1p(-end)
        after_eot = end / (
            1 + end
        )  # the share of tokens that are eot; the n-th symbols' is (1-end)^(n-1) of it

        def mean(cap: int) -> float:
            """Nats per token where at most `cap` symbols are seen."""
            nats = after_eot * known[0]
            for seen in range(1, cap + 1):
                share = after_eot * (1 - end) ** (seen - 1) / (1 if seen < cap else end)
                nats += share * (ending + (1 - end) * known[seen])
            return nats

        if sequence_length is None:
            return mean(self.order)
        caps = [mean(min(place, self.order)) for place in range(1, min(sequence_length, self.order) + 1)]
        return (sum(caps) + (sequence_length - len(caps)) * caps[-1]) / sequence_length

    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """What the best predictor, who knows the chain, loses on each target, float64 [B, T].

        Rows are windows of the bytes tokenizer's tokens; it sees what stands before a target in its window.
        """
        digits = np.full(257, -1)
        digits[_ALPHABET[: self.states]] = np.arange(self.states)
        seen, following, end = digits[tokens], digits[targets], 1 / self.mean_length
        out = np.where(following < 0, -math.log(end), np.where(seen < 0, 0.0, -math.log1p(-end)))
        context, left, known, drawn = np.zeros(seen.shape, int), seen, np.ones(seen.shape, bool), 0.0
        for length, both in enumerate(self._joints()):
            if length:  # the symbol `length` places before the target, where the document reaches so far
                known = known & (left >= 0)
                context = context + np.where(known, left, 0) * self.states ** (length - 1)
                left = np.pad(left, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            symbol = -np.log(both / both.sum(1, keepdims=True))[context, following]
            drawn = np.where(known, symbol, drawn)
        return out + np.where(following < 0, 0.0, drawn)

    def _joints(self) -> list[np.ndarray]:
        """Probability of (the last `seen` symbols, the next one), [states**seen, states], for 0 .. order."""
        joint = self.stationary[:, None] * self.transitions
        return [joint.reshape(-1, self.states**seen, self.states).sum(0) for seen in range(self.order + 1)]

    def _entropies(self) -> list[float]:
        """Nats of the next symbol where the last 0, 1 .. order symbols are known."""
        return [float(-(p * np.log(p / p.sum(1, keepdims=True))).sum()) for p in self._joints()]

    def stamp(self) -> Any:
        return super().stamp() | {"numpy": np.__version__}  # whose random numbers may change

    def documents(self) -> Iterator[Iterable[str]]:
        self.validate()
        for first in range(0, self.documents_count, _BLOCK_DOCUMENTS):
            symbols, lengths = self._block(first)
            wanted = min(self.documents_count - first, _BLOCK_DOCUMENTS)
            for row, length in zip(symbols[:wanted], lengths[:wanted], strict=True):
                yield (_ALPHABET[row[:length]].tobytes().decode(),)

    def _block(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Symbols [documents, longest] and lengths [documents] of the block that begins at `first`."""
        generator = np.random.default_rng([self.seed, 1, first])
        lengths = generator.geometric(1 / self.mean_length, _BLOCK_DOCUMENTS)
        cumulative = np.cumsum(self.transitions, 1)
        context = np.searchsorted(np.cumsum(self.stationary), generator.random(_BLOCK_DOCUMENTS))
        context = np.minimum(context, len(self.stationary) - 1)  # sums may end a rounding below 1
        symbols = np.zeros((_BLOCK_DOCUMENTS, max(lengths.max(), self.order)), np.int64)
        for place in range(self.order):
            symbols[:, place] = context // self.states ** (self.order - 1 - place) % self.states
        for place in range(self.order, lengths.max()):
            living = np.flatnonzero(lengths > place)
            drawn = (generator.random(len(living))[:, None] > cumulative[context[living]]).sum(1)
            symbols[living, place] = np.minimum(drawn, self.states - 1)
            following = context[living] * self.states + symbols[living, place]
            context[living] = following % len(self.transitions)
        return symbols, lengths
