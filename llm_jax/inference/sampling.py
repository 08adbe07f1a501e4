"""How the next token is chosen: what a user sets, and one pure function of logits, settings and keys.

The order is that of transformers' logits processors: bias, repetition penalty, temperature, top-k, top-p,
min-p. A setting beyond what float32 holds means the nearest that it does, and one so strict that no token is
left means the most probable one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request is sampled; the defaults are greedy.

    temperature: 0 takes the most probable token. top_k: of so many at most (0: all). top_p: of the fewest
    that together have this probability (nucleus, arXiv:1904.09751). min_p: of those at least so many times
    as probable as the first (arXiv:2407.01082). repetition_penalty: what stands in the text already has its
    logit divided by it if positive, else multiplied (CTRL, arXiv:1909.05858). logit_bias: added to the
    logits of ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def check(self, vocabulary: int) -> None:
        """Raises UserError for a setting that means nothing."""
        rules = {
            "temperature": (self.temperature, "a number of at least 0", 0 <= self.temperature < math.inf),
            "top_k": (self.top_k, "at least 0 (all tokens)", self.top_k >= 0),
            "top_p": (self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            "min_p": (self.min_p, "between 0 and 1", 0 <= self.min_p <= 1),
            "repetition_penalty": (
                self.repetition_penalty,
                "a positive number",
                0 < self.repetition_penalty < math.inf,
            ),
            "seed": (self.seed, "0 .. 4294967295", 0 <= self.seed < 1 << 32),
        }
        for name, (value, words, fits) in rules.items():
            if not fits:
                raise UserError(f"{name} is {value}; it is {words}")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocabulary or math.isnan(bias) or bias == math.inf:
                raise UserError(
                    f"logit_bias {token}:{bias}: ids lie in 0 .. {vocabulary - 1}, a bias is a number"
                )


FLOATS = np.finfo(np.float32)
FAR = float(FLOATS.max) / 4  # from 0; the difference of two logits is a number too
HOTTEST = 1e30  # at which all tokens are alike but those that FAR keeps out


class Settings(NamedTuple):
    """The settings of B rows as arrays [B], and what is added to their logits [B, V]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    bias: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary: int) -> "Settings":
        """Of settings that `check` let through."""
        bias = np.zeros((len(rows), vocabulary), np.float32)
        for row, sampling in enumerate(rows):
            for token, value in sampling.logit_bias.items():
                bias[row, token] = min(max(value, -FAR), FAR)

        def column(name: str, least: float = float(FLOATS.tiny)) -> np.ndarray:
            return np.array([min(max(getattr(row, name), least), HOTTEST) for row in rows], np.float32)

        hot = np.array([row.temperature > 0 for row in rows])
        return cls(
            np.where(hot, column("temperature"), 0),
            np.array([min(row.top_k, vocabulary) for row in rows], np.int32),
            column("top_p"),
            column("min_p", 0.0),
            column("repetition_penalty"),
            bias,
        )


def processed(logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array) -> jax.Array:
    """The logits that are sampled from, less the row's largest, and -inf where a token is out.

    seen_BV: which tokens the text has. Tokens exactly as probable as the last that is in are in too.
    """
    penalty_B1, k_B1, p_B1, min_B1 = (
        x[:, None] for x in (settings.penalty, settings.top_k, settings.top_p, settings.min_p)
    )
    logits_BV = logits_BV + settings.bias
    punished_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = jnp.clip(jnp.where(seen_BV, punished_BV, logits_BV), -FAR, FAR)
    hot_B = settings.temperature > 0
    logits_BV -= logits_BV.max(-1, keepdims=True)  # a small temperature leaves this one in float32's range
    logits_BV /= jnp.where(hot_B, settings.temperature, 1.0)[:, None]

    def cut(logits_BV: jax.Array) -> jax.Array:
        V = logits_BV.shape[-1]
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        sorted_BV = jnp.where((jnp.arange(V) < k_B1) | (k_B1 == 0), sorted_BV, -jnp.inf)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        inside_BV = (jnp.cumsum(p_BV, axis=-1) - p_BV < p_B1) & (sorted_BV > -jnp.inf)
        inside_BV &= p_BV >= min_B1 * p_BV[:, :1]
        inside_BV |= jnp.arange(V) == 0
        last_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)

    cutting_B = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    return jax.lax.cond(jnp.any(cutting_B & hot_B), cut, lambda x: x, logits_BV)


def sample(logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """The next token [B] of each row by its own settings and its own key, whatever the other rows are."""
    logits_BV = processed(logits_BV, settings, seen_BV)
    hot_B = settings.temperature > 0

    def drawn(logits_BV: jax.Array) -> jax.Array:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        return logits_BV + jnp.where(hot_B[:, None], noise_BV, 0)

    logits_BV = jax.lax.cond(jnp.any(hot_B), drawn, lambda x: x, logits_BV)
    # The first of the largest, as argmax finds it, in two passes that XLA vectorises on a CPU.
    V = logits_BV.shape[-1]
    found_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    return jnp.where(found_BV, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)
