"""Attention in blocks of queries, and a gradient that computes the scores again: memory linear in the length.

`chunked` is self-attention. Ring attention is made of the same `forward` and `backward`, on keys that may
stand anywhere before or after the queries.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.kernels import devices

Segments = tuple[jax.Array, jax.Array] | None  # of queries [B, T] and of keys [B, S]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a score is: scale * q.k, capped to (-softcap, softcap), within the last `window` positions."""

    scale: float
    softcap: float | None
    window: int | None


def scores(q_BGRTK: jax.Array, k_BGSK: jax.Array, rule: Rule) -> jax.Array:
    """Float32 [B, G, R, T, S] of R query heads that share each of G key heads."""
    found = _dot("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK) * rule.scale
    return found if rule.softcap is None else rule.softcap * jnp.tanh(found / rule.softcap)


def visible(
    rows: jax.Array, keys: slice, segments: Segments, rule: Rule, ahead: int | jax.Array = 0
) -> jax.Array:
    """Which of the keys each of the queries in `rows` sees, broadcastable to BGRTS.

    ahead: how many positions the first query stands after the first key.
    """
    i, j = rows[:, None] + ahead, jnp.arange(keys.start, keys.stop)
    seen = j <= i
    if rule.window is not None:
        seen &= j > i - rule.window
    if segments is not None:
        of_queries, of_keys = segments
        seen = (seen & (of_queries[:, rows, None] == of_keys[:, None, keys]))[:, None, None]
    return seen


def grouped(x_BTHK: jax.Array, key_heads: int) -> jax.Array:
    """[B, T, H, K] as [B, G, R, T, K]: R query heads share each of G key heads."""
    B, T, _, K = x_BTHK.shape
    return x_BTHK.reshape(B, T, key_heads, -1, K).transpose(0, 2, 3, 1, 4)


def ungrouped(x_BGRTK: jax.Array) -> jax.Array:
    """The inverse of `grouped`."""
    x_BTGRK = x_BGRTK.transpose(0, 3, 1, 2, 4)
    return x_BTGRK.reshape(*x_BTGRK.shape[:2], -1, x_BTGRK.shape[-1])


def cuts(length: int) -> tuple[int, int]:
    """Queries at once, and how many pieces of the program are straight code: more would skip more keys.

    CPU: few keys above the diagonal, scores in a core's cache, and no loop up to 8 x 128 queries, as it costs
    more than a larger block; elsewhere: big products, and less to compile.
    """
    if devices.platform() != "cpu":
        return 512, 4
    return (64 if length <= 512 else 128), 8


class Stripe(NamedTuple):
    """`blocks` blocks of `size` queries from position `start`, and the keys that any of them may see."""

    start: int
    blocks: int
    size: int
    keys: slice


def stripes(length: int, keys: int, window: int | None, aligned: bool, calls: int = 1) -> list[Stripe]:
    """How `length` queries are cut; the last stripe may reach past the end.

    aligned: query i stands where key i does, so that a stripe skips keys. Else all see all, in one stripe.
    calls: how many share the program's straight code, of which XLA may hold all scores at once.
    """
    most, pieces = cuts(length)
    blocks = -(-length // most)
    size, each = -(-length // blocks), -(-blocks * calls // pieces)
    if not aligned:
        return [Stripe(0, blocks, size, slice(0, keys))]
    cut = []
    for first in range(0, blocks, each):
        start, count = first * size, min(each, blocks - first)
        oldest = 0 if window is None else max(0, start - window + 1)
        cut.append(Stripe(start, count, size, slice(oldest, min(start + count * size, length))))
    return cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(q_BGRTK, k_BGSK, v_BGSK, segments_BT, rule: Rule) -> jax.Array:
    """Equal to `attention.reference`, one block of queries at a time (Rabe & Staats 2021, arXiv:2112.05682).

    The gradient keeps q, k, v, the result and each row's log-sum-exp, and computes the weights again from
    them (Dao et al. 2022, arXiv:2205.14135, section 3.1).
    """
    return forward(q_BGRTK, k_BGSK, v_BGSK, twice(segments_BT), rule)[0]


def twice(segments_BT: jax.Array | None) -> Segments:
    """The segments of self-attention."""
    return None if segments_BT is None else (segments_BT, segments_BT)


def forward(
    q_BGRTK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segments: Segments,
    rule: Rule,
    ahead: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
    calls: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The result and each row's log-sum-exp, [B, G, R, T, K] and float32 [B, G, R, T, 1].

    ahead: how many positions the first query stands after the first key; None is self-attention. A row that
    sees nothing has the result 0 and the log-sum-exp of minus infinity. dtype: the result's, if it isn't that
    of the queries. calls: see `stripes`.
    """
    q_BGRTK, segments, zero = _tied(q_BGRTK, segments)
    length, pieces = q_BGRTK.shape[3], []
    for stripe in stripes(length, k_BGSK.shape[2], rule.window, ahead is None, calls):
        k, v = k_BGSK[:, :, stripe.keys], v_BGSK[:, :, stripe.keys]

        def block(_, xs, k=k, v=v, keys=stripe.keys):
            rows, q = xs
            seen = visible(rows, keys, segments, rule, 0 if ahead is None else ahead)
            found = jnp.where(seen, scores(q, k, rule), -jnp.inf)
            top = jnp.maximum(found.max(axis=-1, keepdims=True), LEAST)
            weights = jnp.exp(found - top)
            total = weights.sum(axis=-1, keepdims=True)
            out = _dot("BGRTS,BGSK->BGRTK", weights.astype(v.dtype), v) / jnp.where(total == 0, 1, total)
            return None, (out.astype(dtype or q.dtype), top + jnp.log(total))

        pieces.append(jax.lax.scan(block, None, (zero + _rows(stripe), _cut(q_BGRTK, stripe)))[1])
    return tuple(_join(parts, length) for parts in zip(*pieces, strict=True))


def backward(
    q_BGRTK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    segments: Segments,
    norm_BGRT1: jax.Array,
    inner_BGRT1: jax.Array,
    d_out_BGRTK: jax.Array,
    rule: Rule,
    ahead: jax.Array | None = None,
    calls: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The parts of the gradients of q, k and v, float32, that come from these keys.

    norm: each row's log-sum-exp over all its keys, which may be more. inner: d_out . out.
    """
    q_BGRTK, segments, zero = _tied(q_BGRTK, segments)
    d_q, d_k, d_v = [], jnp.zeros(k_BGSK.shape, jnp.float32), jnp.zeros(v_BGSK.shape, jnp.float32)
    for stripe in stripes(q_BGRTK.shape[3], k_BGSK.shape[2], rule.window, ahead is None, calls):
        k, v = k_BGSK[:, :, stripe.keys], v_BGSK[:, :, stripe.keys]

        def block(sums, xs, k=k, v=v, keys=stripe.keys):
            rows, q, d_out, norm, inner = xs
            found = scores(q, k, rule)
            seen = visible(rows, keys, segments, rule, 0 if ahead is None else ahead)
            weights = jnp.exp(jnp.where(seen, found, -jnp.inf) - norm)
            d_scores = weights * (_dot("BGRTK,BGSK->BGRTS", d_out, v) - inner) * rule.scale
            if rule.softcap is not None:
                d_scores *= 1 - jnp.square(found / rule.softcap)
            d_scores = d_scores.astype(q.dtype)
            d_k = _dot("BGRTS,BGRTK->BGSK", d_scores, q)
            d_v = _dot("BGRTS,BGRTK->BGSK", weights.astype(d_out.dtype), d_out)
            return (sums[0] + d_k, sums[1] + d_v), _dot("BGRTS,BGSK->BGRTK", d_scores, k)

        zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        xs = (q_BGRTK, d_out_BGRTK, norm_BGRT1, inner_BGRT1)
        sums, piece = jax.lax.scan(block, zeros, (zero + _rows(stripe), *(_cut(x, stripe) for x in xs)))
        d_k, d_v = d_k.at[:, :, stripe.keys].add(sums[0]), d_v.at[:, :, stripe.keys].add(sums[1])
        d_q.append(piece)
    return _join(d_q, q_BGRTK.shape[3]), d_k, d_v


def inner(d_out_BGRTK: jax.Array, out_BGRTK: jax.Array) -> jax.Array:
    """d_out . out of each row, float32 [B, G, R, T, 1]."""
    return _dot("BGRTK,BGRTK->BGRT", d_out_BGRTK, out_BGRTK)[..., None]


def _forward_rule(q_BGRTK, k_BGSK, v_BGSK, segments_BT, rule: Rule):
    out_BGRTK, norm_BGRT1 = forward(q_BGRTK, k_BGSK, v_BGSK, twice(segments_BT), rule)
    return out_BGRTK, (q_BGRTK, k_BGSK, v_BGSK, segments_BT, out_BGRTK, norm_BGRT1)


def _backward_rule(rule: Rule, saved, d_out_BGRTK):
    *qkv, segments_BT, out_BGRTK, norm_BGRT1 = saved
    inner_BGRT1 = inner(d_out_BGRTK, out_BGRTK)
    gradients = backward(*qkv, twice(segments_BT), norm_BGRT1, inner_BGRT1, d_out_BGRTK, rule)
    return *(d.astype(x.dtype) for d, x in zip(gradients, qkv, strict=True)), None


chunked.defvjp(_forward_rule, _backward_rule)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
LEAST = jnp.finfo(jnp.float32).min


def _tied(q_BGRTK: jax.Array, segments: Segments) -> tuple[jax.Array, Segments, jax.Array]:
    """Queries, segments and a zero, of which none is known before the others.

    Out of a scan over layers JAX moves what is the same in all of them: the masks, all T x T of them.
    """
    return jax.lax.optimization_barrier((q_BGRTK, segments, jnp.int32(0)))


def _rows(stripe: Stripe) -> jax.Array:
    """The rows of a stripe's queries, [blocks, size]."""
    return stripe.start + jnp.arange(stripe.blocks * stripe.size).reshape(stripe.blocks, stripe.size)


def _cut(x_BGRTK: jax.Array, stripe: Stripe) -> jax.Array:
    """A stripe's queries as [blocks, B, G, R, size, K].

    Zeros fill what reaches past the end: later queries see only what exists, and no gradient comes from them.
    """
    stop = stripe.start + stripe.blocks * stripe.size
    x = x_BGRTK[:, :, :, stripe.start : stop]
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, stop - stripe.start - x.shape[3]), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:3], stripe.blocks, stripe.size, -1), 3, 0)


def _join(pieces: list[jax.Array], length: int) -> jax.Array:
    """The inverse of `_cut` for all stripes: [B, G, R, T, K]."""
    rows = [jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]) for x in pieces]
    return jnp.concatenate(rows, axis=3)[:, :, :, :length]
