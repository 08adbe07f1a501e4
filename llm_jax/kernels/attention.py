"""Causal attention: one definition, and faster ways to compute it.

`attend` is what models call. Its definition is `reference`, a dozen lines; every other kind returns the same
numbers and is tested against it:

    reference   all T x T scores at once; quadratic memory; the definition
    chunked     blocks of queries that skip the keys they cannot see; linear memory; any device
    cudnn       NVIDIA's fused kernel; bfloat16 or float16, no score soft-cap; linear memory, but with
                segments it reads a bias of T x T numbers for each row of the batch (one for all heads)
    auto        cudnn where it can run on a GPU, otherwise chunked; so segments cost that memory there
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a score is: scale * q.k, capped to (-softcap, softcap), within the last `window` positions."""

    scale: float
    softcap: float | None
    window: int | None


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segments: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    kind: str = "auto",
) -> jax.Array:
    """Causal self-attention within equal segments, [B, T, H, K], over G key/value heads (H % G == 0).

    The K of values is that of the result, and may be another than that of queries and keys in the reference.
    Query i sees key j iff i - window < j <= i and segments[b, i] == segments[b, j]; segments is int [B, T].
    Each key head serves H/G consecutive query heads. A score is scale * q.k (scale: K ** -0.5), capped to
    softcap * tanh(score / softcap). The softmax is float32, the result has q's dtype. Raises UserError for a
    kind that cannot do this here.
    """
    heads, key_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    if q_BTHK.shape[1] != k_BSGK.shape[1] or heads % key_heads:
        raise ValueError(f"self-attention of {q_BTHK.shape} over {k_BSGK.shape}: T or heads don't fit")
    rule = Rule(q_BTHK.shape[-1] ** -0.5 if scale is None else scale, softcap, window)
    if kind == "auto":
        kind = "chunked" if why_not_cudnn(q_BTHK, segments, rule) else "cudnn"
    if kind == "cudnn":
        if reason := why_not_cudnn(q_BTHK, segments, rule):
            raise UserError(f"execution.layout.attention=cudnn cannot run: {reason}; chunked or auto can")
        return _cudnn(q_BTHK, k_BSGK, v_BSGK, segments, rule)
    if kind not in ("reference", "chunked"):
        raise UserError(f"no attention {kind!r} here; there are: auto, reference, chunked, cudnn")
    q_BTGRK = q_BTHK.reshape(*q_BTHK.shape[:2], key_heads, heads // key_heads, -1)
    q_BGRTK = q_BTGRK.transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    if kind == "reference":
        out_BGRTK = reference(q_BGRTK, k_BGSK, v_BGSK, segments, rule)
    else:
        out_BGRTK = chunked(q_BGRTK, k_BGSK, v_BGSK, segments, rule)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(*q_BTHK.shape[:3], -1)


def why_not_cudnn(q_BTHK: jax.Array, segments: jax.Array | None, rule: Rule) -> str | None:
    """Why NVIDIA's fused kernel cannot compute this on the default device; None if it can."""
    device, (_, length, _, width) = jax.devices()[0], q_BTHK.shape
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {q_BTHK.dtype}"
    if rule.softcap is not None:
        return "it has no soft-cap on scores"
    if width % 8 or width > 128:
        return f"its heads are a multiple of 8 and at most 128 wide, not {width}"
    if segments is not None and length % 2:
        return f"with segments it takes an even number of tokens, not {length}"
    return None


def _cudnn(q_BTHK, k_BSGK, v_BSGK, segments, rule: Rule) -> jax.Array:
    # The kernel knows no segments: their mask becomes a bias [B, 1, T, T] of q's dtype, quadratic in T.
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    window = None if rule.window is None else (rule.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, None, mask, scale=rule.scale, is_causal=True,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip


def reference(q_BGRTK, k_BGSK, v_BGSK, segments, rule: Rule) -> jax.Array:
    """The definition; R query heads share each of G key heads."""
    length = q_BGRTK.shape[3]
    scores = _scores(q_BGRTK, k_BGSK, rule)
    visible = _visible(jnp.arange(length), slice(0, length), segments, rule)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BGRTS,BGSK->BGRTK", weights.astype(v_BGSK.dtype), v_BGSK)


def _scores(q_BGRTK, k_BGSK, rule: Rule) -> jax.Array:
    scores = jnp.einsum("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32) * rule.scale
    return scores if rule.softcap is None else rule.softcap * jnp.tanh(scores / rule.softcap)


def _visible(rows: jax.Array, keys: slice, segments: jax.Array | None, rule: Rule) -> jax.Array:
    """Which of the keys each of the queries at positions `rows` sees, broadcastable to BGRTS."""
    i, j = rows[:, None], jnp.arange(keys.start, keys.stop)
    visible = j <= i
    if rule.window is not None:
        visible &= j > i - rule.window
    if segments is not None:
        same = segments[:, rows, None] == segments[:, None, keys]
        visible = (visible & same)[:, None, None]
    return visible


# ---- chunked: blocks of queries, and a gradient that computes the scores again ----

STRIPES = 8  # straight-line pieces of the program; more would skip more keys and compile longer


def block_size(length: int) -> int:
    """Queries at once. CPU: few keys above the diagonal, scores in a core's cache; elsewhere: big products.

    A CPU's loops cost more than a larger block: blocks are straight code up to 8 x 128 queries.
    """
    if jax.default_backend() != "cpu":
        return 512
    return 64 if length <= 64 * STRIPES else 128


class Stripe(NamedTuple):
    """`blocks` blocks of `size` queries from position `start`, and the keys that any of them may see."""

    start: int
    blocks: int
    size: int
    keys: slice


def stripes(length: int, window: int | None) -> list[Stripe]:
    """How chunked attention cuts `length` queries; the last stripe may reach past the end."""
    blocks = -(-length // block_size(length))
    size, each = -(-length // blocks), -(-blocks // STRIPES)
    cut = []
    for first in range(0, blocks, each):
        start, count = first * size, min(each, blocks - first)
        oldest = 0 if window is None else max(0, start - window + 1)
        cut.append(Stripe(start, count, size, slice(oldest, min(start + count * size, length))))
    return cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(q_BGRTK, k_BGSK, v_BGSK, segments, rule: Rule) -> jax.Array:
    """Equal to `reference`, one block of queries at a time (Rabe & Staats 2021, arXiv:2112.05682).

    The gradient keeps q, k, v, the result and each row's log-sum-exp, and computes the weights again from
    them (Dao et al. 2022, arXiv:2205.14135, section 3.1).
    """
    return _forward(q_BGRTK, k_BGSK, v_BGSK, segments, rule)[0]


def _forward(q_BGRTK, k_BGSK, v_BGSK, segments, rule: Rule):
    length, pieces = q_BGRTK.shape[3], []
    for stripe in stripes(length, rule.window):
        k, v = k_BGSK[:, :, stripe.keys], v_BGSK[:, :, stripe.keys]

        def block(_, xs, k=k, v=v, keys=stripe.keys):
            rows, q = xs
            scores = jnp.where(_visible(rows, keys, segments, rule), _scores(q, k, rule), -jnp.inf)
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            out = _dot("BGRTS,BGSK->BGRTK", weights.astype(v.dtype), v) / total
            return None, (out.astype(q.dtype), top + jnp.log(total))

        pieces.append(jax.lax.scan(block, None, (_rows(stripe), _cut(q_BGRTK, stripe)))[1])
    return tuple(_join(parts, length) for parts in zip(*pieces, strict=True))


def _forward_rule(q_BGRTK, k_BGSK, v_BGSK, segments, rule: Rule):
    out_BGRTK, norm_BGRT1 = _forward(q_BGRTK, k_BGSK, v_BGSK, segments, rule)
    return out_BGRTK, (q_BGRTK, k_BGSK, v_BGSK, segments, out_BGRTK, norm_BGRT1)


def _backward_rule(rule: Rule, saved, d_out_BGRTK):
    q_BGRTK, k_BGSK, v_BGSK, segments, out_BGRTK, norm_BGRT1 = saved
    inner_BGRT1 = _dot("BGRTK,BGRTK->BGRT", d_out_BGRTK, out_BGRTK)[..., None]
    d_q, d_k, d_v = [], jnp.zeros(k_BGSK.shape, jnp.float32), jnp.zeros(v_BGSK.shape, jnp.float32)
    for stripe in stripes(q_BGRTK.shape[3], rule.window):
        k, v = k_BGSK[:, :, stripe.keys], v_BGSK[:, :, stripe.keys]

        def block(sums, xs, k=k, v=v, keys=stripe.keys):
            rows, q, d_out, norm, inner = xs
            scores = _scores(q, k, rule)
            weights = jnp.exp(jnp.where(_visible(rows, keys, segments, rule), scores, -jnp.inf) - norm)
            d_scores = weights * (_dot("BGRTK,BGSK->BGRTS", d_out, v) - inner) * rule.scale
            if rule.softcap is not None:
                d_scores *= 1 - jnp.square(scores / rule.softcap)
            d_scores = d_scores.astype(q.dtype)
            d_k = _dot("BGRTS,BGRTK->BGSK", d_scores, q)
            d_v = _dot("BGRTS,BGRTK->BGSK", weights.astype(d_out.dtype), d_out)
            d_q = _dot("BGRTS,BGSK->BGRTK", d_scores, k).astype(q.dtype)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        xs = (q_BGRTK, d_out_BGRTK, norm_BGRT1, inner_BGRT1)
        sums, piece = jax.lax.scan(block, zeros, (_rows(stripe), *(_cut(x, stripe) for x in xs)))
        d_k, d_v = d_k.at[:, :, stripe.keys].add(sums[0]), d_v.at[:, :, stripe.keys].add(sums[1])
        d_q.append(piece)
    d_q = _join(d_q, q_BGRTK.shape[3])
    return d_q, d_k.astype(k_BGSK.dtype), d_v.astype(v_BGSK.dtype), None


chunked.defvjp(_forward_rule, _backward_rule)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(stripe: Stripe) -> jax.Array:
    """The positions of a stripe's queries, [blocks, size]."""
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
