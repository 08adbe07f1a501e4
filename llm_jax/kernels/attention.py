"""Causal attention: one definition, and faster ways to compute it.

`attend` is what models call. Its definition is `reference`, a dozen lines; every other kind returns the same
numbers and is tested against it:

    reference   all T x T scores at once; quadratic memory; the definition
    chunked     blocks of queries that skip the keys they cannot see; linear memory; any device
    cudnn       NVIDIA's fused kernel; bfloat16 or float16, no score soft-cap; linear memory, but with
                segments it reads a bias of T x T numbers for each row of the batch (one for all heads)
    splash      the TPU's fused kernel; multiples of 128 tokens; linear memory, segments too
    ring        the sequence spread over devices; tokens are in an order of its own (ring_attention.py)
    auto        on a TPU splash, on a GPU cudnn, where they can run and a bias is no larger than what is
                attended to; otherwise chunked
"""

import jax
import jax.numpy as jnp

from llm_jax.config import UserError
from llm_jax.kernels import ring_attention, splash
from llm_jax.kernels.chunked import Rule, chunked, grouped, scores, twice, ungrouped, visible


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
        kind = fastest(q_BTHK, segments, rule)
    if kind == "splash":
        if reason := splash.why_not(q_BTHK.shape[1]):
            raise UserError(f"execution.layout.attention=splash cannot run: {reason}; chunked or auto can")
        return splash.splash(q_BTHK, k_BSGK, v_BSGK, segments, rule)
    if kind == "cudnn":
        if reason := why_not_cudnn(q_BTHK, segments, rule):
            raise UserError(f"execution.layout.attention=cudnn cannot run: {reason}; chunked or auto can")
        return _cudnn(q_BTHK, k_BSGK, v_BSGK, segments, rule)
    if kind == "ring":
        if ring_attention.ways() == 1:
            raise UserError("execution.layout.attention=ring needs devices: execution.mesh.sequence is 1")
        return ring_attention.ring(q_BTHK, k_BSGK, v_BSGK, segments, rule)
    if kind not in ("reference", "chunked"):
        raise UserError(
            f"no attention {kind!r} here; there are: auto, reference, chunked, cudnn, splash, ring"
        )
    attention = reference if kind == "reference" else chunked
    q_BGRTK = grouped(q_BTHK, key_heads)
    return ungrouped(attention(q_BGRTK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), segments, rule))


def fastest(q_BTHK: jax.Array, segments: jax.Array | None, rule: Rule) -> str:
    """The kind that auto stands for here."""
    if splash.why_not(q_BTHK.shape[1]) is None:
        return "splash"
    length, numbers = q_BTHK.shape[1], 4 * q_BTHK.shape[2] * q_BTHK.shape[3]
    too_long = (
        segments is not None and length > numbers
    )  # the bias would outgrow queries, keys, values, result
    return "chunked" if too_long or why_not_cudnn(q_BTHK, segments, rule) else "cudnn"


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
    seen = visible(jnp.arange(length), slice(0, length), twice(segments), rule)
    weights = jax.nn.softmax(jnp.where(seen, scores(q_BGRTK, k_BGSK, rule), -jnp.inf), axis=-1)
    return jnp.einsum("BGRTS,BGSK->BGRTK", weights.astype(v_BGSK.dtype), v_BGSK)
