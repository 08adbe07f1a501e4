"""Splash attention, the fused TPU kernel that comes with JAX, on each device's rows and heads."""

import math

import jax

from llm_jax import sharding
from llm_jax.kernels import devices
from llm_jax.kernels.chunked import Rule

BLOCKS = 512, 256, 128  # queries and keys at once: the first that divides the sequence

NAME = "splash"  # begins the names of its kernels


def why_not(length: int) -> str | None:
    """Why the kernel cannot attend over `length` tokens on the devices at hand; None if it can."""
    if devices.platform() != "tpu":
        return f"the device is a {devices.platform()}, not a TPU"
    if length % BLOCKS[-1]:
        return f"it takes a multiple of {BLOCKS[-1]} tokens, not {length}"
    return None


def splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BT: jax.Array | None,
    rule: Rule,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention, [B, T, H, K]; interpret: as XLA's operations, on any device."""
    # Imported late: Pallas takes as long as the rest of JAX.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q_BTHK.shape[1]
    size = next(block for block in BLOCKS if length % block == 0)
    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    blocks = kernels.BlockSizes(**{f"block_{name}": size for name in names})
    shape = length, length
    mask = masks.CausalMask(shape) if rule.window is None else masks.LocalMask(shape, (rule.window - 1, 0), 0)

    def local(q_BTHK, k_BSGK, v_BSGK, segments_BT):
        attend = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q_BTHK.shape[2]),
            block_sizes=blocks,
            attn_logits_soft_cap=rule.softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = None if segments_BT is None else kernels.SegmentIds(segments_BT, segments_BT)
        q_BHTK, k_BGSK, v_BGSK = (x.swapaxes(1, 2) for x in (q_BTHK * rule.scale, k_BSGK, v_BSGK))
        return jax.vmap(attend)(q_BHTK, k_BGSK, v_BGSK, segments).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return local(q_BTHK, k_BSGK, v_BSGK, segments_BT)
    place = sharding.spec(k_BSGK.shape, ("batch", None, "kv_heads", None), mesh)
    places = place, place, place, jax.P(place[0])
    return jax.shard_map(local, in_specs=places, out_specs=place, check_vma=False)(
        q_BTHK, k_BSGK, v_BSGK, segments_BT
    )


def visited(name: str, grid: tuple[int, ...]) -> int:
    """In how many steps of a kernel's grid it computes: a triangle of blocks, or what a window leaves of it.

    grid: [..., rows, widest row] of blocks; [..., columns, heads, longest column] for the gradients of keys
    and values.
    """
    rows, width = grid[-3 if "_dkv" in name else -2], grid[-1]
    return math.prod(grid) // (rows * width) * sum(min(row + 1, width) for row in range(rows))
