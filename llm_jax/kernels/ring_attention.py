"""Ring attention: a sequence over many devices, keys and values going round (Liu et al., arXiv:2310.01889).

Each device keeps its queries, and at every step passes the keys and values that it holds on to the next one.
For causal attention in plain order the first device would soon see nothing, so tokens are dealt out in a
zigzag (Llama 3, arXiv:2407.21783, section 3.3.2): of 2 n equal chunks device i has chunk i and chunk
2 n - 1 - i. Then at every step but the first each device has two pairs of chunks to do: where the keys come
from a device before it, both its chunks see their first one, and else its second chunk sees both of theirs.
No device ever holds more scores than those of a block of queries and a chunk of keys.

The gradient goes round in the same way, with the gradients of keys and values beside them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.kernels import chunked
from llm_jax.kernels.chunked import Rule, grouped, ungrouped

AXIS = "sequence"  # of the mesh


def ways() -> int:
    """Over how many devices the mesh at hand spreads a sequence."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


# ---- the zigzag order ----


def zigzag(length: int, devices: int) -> np.ndarray:
    """The positions of `length` tokens in the order in which the devices hold them.

    Raises UserError unless all chunks are equal.
    """
    if length % (2 * devices):
        raise UserError(
            f"a sequence of {length} tokens doesn't divide over execution.mesh.sequence={devices}, which "
            f"cuts it in {2 * devices} chunks; a multiple of {2 * devices} does"
        )
    chunks = np.arange(length).reshape(2 * devices, -1)
    return chunks[[chunk for pair in _dealt(devices) for chunk in pair]].ravel()


def _dealt(devices: int) -> list[tuple[int, int]]:
    """The two chunks of each device."""
    return [(i, 2 * devices - 1 - i) for i in range(devices)]


def in_order(x_BTD: jax.Array) -> jax.Array:
    """What lies in the zigzag order, in the order of time; no device ever holds more than its part."""
    # One of a device's chunks has an even number. The even ones go to different devices, so do the odd ones.
    sent = {
        parity: [(i, next(c for c in pair if c % 2 == parity) // 2) for i, pair in enumerate(_dealt(ways()))]
        for parity in (0, 1)
    }

    def local(x_BTD: jax.Array) -> jax.Array:
        first, second = jnp.split(x_BTD, 2, axis=1)
        even, odd = _choose(jax.lax.axis_index(AXIS) % 2 == 0, (first, second), (second, first))
        parts = jax.lax.ppermute(even, AXIS, sent[0]), jax.lax.ppermute(odd, AXIS, sent[1])
        return jnp.concatenate(parts, axis=1)

    place = sharding.spec(x_BTD.shape, ("batch", "time", None), jax.sharding.get_abstract_mesh())
    return jax.shard_map(local, in_specs=place, out_specs=place)(x_BTD)


# ---- attention ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, segments_BT: jax.Array | None, rule: Rule
) -> jax.Array:
    """Causal self-attention [B, T, H, K] of arrays in the zigzag order, spread over the mesh at hand."""
    return _forward_rule(q_BTHK, k_BSGK, v_BSGK, segments_BT, rule)[0]


def _forward_rule(q_BTHK, k_BSGK, v_BSGK, segments_BT, rule: Rule):
    def local(q_BTHK, *held):
        queries, keys = _chunks(q_BTHK, *held)
        out, norm = zip(*_forward(queries, keys, rule), strict=True)
        return ungrouped(jnp.concatenate(out, axis=3)).astype(q_BTHK.dtype), jnp.concatenate(norm, axis=3)

    arrays = q_BTHK, k_BSGK, v_BSGK, segments_BT
    row, norm = _places(k_BSGK)
    out_BTHK, norm_BGRT1 = _on_devices(local, arrays, (row, row, row, jax.P(*row[:2])), (row, norm))
    return out_BTHK, (*arrays, out_BTHK, norm_BGRT1)


def _backward_rule(rule: Rule, saved: tuple, d_out_BTHK: jax.Array):
    def local(q_BTHK, k_BSGK, v_BSGK, segments_BT, out_BTHK, norm_BGRT1, d_out_BTHK):
        queries, keys = _chunks(q_BTHK, k_BSGK, v_BSGK, segments_BT)
        out, d_out = (_halves(grouped(x, k_BSGK.shape[2]), 3) for x in (out_BTHK, d_out_BTHK))
        told = [
            Told(*x) for x in zip(_halves(norm_BGRT1, 3), map(chunked.inner, d_out, out), d_out, strict=True)
        ]
        d_q, d_keys = _backward(queries, keys, told, rule)
        d_k, d_v = (jnp.concatenate(d, axis=2).swapaxes(1, 2) for d in zip(*d_keys, strict=True))
        return (
            ungrouped(jnp.concatenate(d_q, axis=3)).astype(q_BTHK.dtype),
            d_k.astype(k_BSGK.dtype),
            d_v.astype(v_BSGK.dtype),
        )

    row, norm = _places(saved[1])
    places = row, row, row, jax.P(*row[:2]), row, norm, row
    return *_on_devices(local, (*saved, d_out_BTHK), places, (row, row, row)), None


ring.defvjp(_forward_rule, _backward_rule)


class Queries(NamedTuple):
    """A chunk of them, its segments [B, C], and the position of its first one."""

    q: jax.Array
    segments: jax.Array | None
    start: jax.Array


class Keys(NamedTuple):
    """A chunk of keys and values, and its segments [B, C]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


class Told(NamedTuple):
    """What the gradient needs to know of a chunk of queries (`chunked.backward`)."""

    norm: jax.Array
    inner: jax.Array
    d_out: jax.Array


def _forward(queries: list[Queries], keys: list[Keys], rule: Rule) -> list[tuple[jax.Array, jax.Array]]:
    """(result, log-sum-exp), float32, of each of this device's two chunks of queries."""
    part = functools.partial(chunked.forward, dtype=jnp.float32)  # rounded once, when all are merged
    see, me, last = _seeing(part, rule, keys), jax.lax.axis_index(AXIS), 2 * ways() - 1
    first, second = queries

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        held, (low, high) = carry
        held, other = _pass_on(held), (me - step) % ways()
        before, (near, far) = other < me, ((held[0], other), (held[1], last - other))
        one = see(_choose(before, first, second), *near)
        two = see(second, *_choose(before, near, far))
        nothing = one[0], jnp.full_like(one[1], -jnp.inf)
        low = _merge(low, _choose(before, one, nothing))
        high = _merge(_merge(high, _choose(before, nothing, one)), two)
        return (held, (low, high)), None

    low, high = see(first, keys[0]), _merge(see(second, keys[1]), see(second, keys[0], me))
    return jax.lax.scan(turn, (keys, (low, high)), jnp.arange(1, ways()))[0][1]


def _backward(
    queries: list[Queries], keys: list[Keys], told: list[Told], rule: Rule
) -> tuple[list[jax.Array], list[tuple[jax.Array, jax.Array]]]:
    """The gradients of this device's chunks: of queries, and (of keys, of values), float32."""
    pull, me, last = _seeing(chunked.backward, rule, keys), jax.lax.axis_index(AXIS), 2 * ways() - 1
    (first, second), (of_first, of_second) = queries, told

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        held, d_held, (d_low, d_high) = carry
        (held, (d_near, d_far)), other = _pass_on((held, d_held)), (me - step) % ways()
        before, (near, far) = other < me, ((held[0], other), (held[1], last - other))
        d_q, *d_one = pull(_choose(before, first, second), *near, *_choose(before, of_first, of_second))
        d_high_too, *d_two = pull(second, *_choose(before, near, far), *of_second)
        nothing = jax.tree.map(jnp.zeros_like, d_two)
        d_low, d_high = _add(
            (d_low, d_high), _choose(before, (d_q, d_high_too), (d_low * 0, d_q + d_high_too))
        )
        d_near = _add(d_near, _add(d_one, _choose(before, d_two, nothing)))
        d_far = _add(d_far, _choose(before, nothing, d_two))
        return (held, (d_near, d_far), (d_low, d_high)), None

    d_low, *d_near = pull(first, keys[0], None, *of_first)
    d_high, *d_far = pull(second, keys[1], None, *of_second)
    d_high_too, *d_near_too = pull(second, keys[0], me, *of_second)
    carry = keys, (_add(d_near, d_near_too), d_far), (d_low, d_high + d_high_too)
    _, d_keys, d_queries = jax.lax.scan(turn, carry, jnp.arange(1, ways()))[0]
    return d_queries, _pass_on(d_keys)  # home


def _seeing(function: Callable, rule: Rule, keys: list[Keys]) -> Callable:
    """`function` of chunked.py, by (queries, keys, the number of their chunk, anything more).

    None: it is that of the queries. A device has two chunks, so there are two calls where one device has one.
    """
    size = keys[0].k.shape[2]

    def see(queries: Queries, held: Keys, chunk: jax.Array | None = None, *more: jax.Array) -> Any:
        segments = None if held.segments is None else (queries.segments, held.segments)
        ahead = None if chunk is None else queries.start - chunk * size
        return function(queries.q, held.k, held.v, segments, *more, rule=rule, ahead=ahead, calls=2)

    return see


def _merge(one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(result, log-sum-exp) over the keys of both; one of them has any."""
    norm = jnp.logaddexp(one[1], two[1])
    return one[0] * jnp.exp(one[1] - norm) + two[0] * jnp.exp(two[1] - norm), norm


def _choose(which: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _pass_on(tree: Any) -> Any:
    """What the device before had."""
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % ways()) for i in range(ways())])


# ---- where things lie ----


def _places(k_BSGK: jax.Array) -> tuple[jax.P, jax.P]:
    """Of queries, keys and values (queries lie where the keys do that they share), and of [B, G, R, T, 1]."""
    axes = "batch", "time", "kv_heads", "head_dim"
    row = sharding.spec(k_BSGK.shape, axes, jax.sharding.get_abstract_mesh())
    return row, jax.P(row[0], row[2], None, row[1], None)


def _on_devices(local: Callable, arrays: Sequence[Any], places: tuple, out: tuple) -> Any:
    return jax.shard_map(local, in_specs=places, out_specs=out, check_vma=False)(*arrays)


def _chunks(q_BTHK, k_BSGK, v_BSGK, segments_BT) -> tuple[list[Queries], list[Keys]]:
    """This device's part of all arrays, as its two chunks."""
    me, size = jax.lax.axis_index(AXIS), k_BSGK.shape[1] // 2
    starts = me * size, (2 * ways() - 1 - me) * size
    q = _halves(grouped(q_BTHK, k_BSGK.shape[2]), 3)
    k, v = (_halves(x.swapaxes(1, 2), 2) for x in (k_BSGK, v_BSGK))
    segments = [None] * 2 if segments_BT is None else _halves(segments_BT, 1)
    queries = [Queries(*x) for x in zip(q, segments, starts, strict=True)]
    return queries, [Keys(*x) for x in zip(k, v, segments, strict=True)]


def _halves(x: jax.Array, axis: int) -> list[jax.Array]:
    return jnp.split(x, 2, axis)
