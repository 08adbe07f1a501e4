"""Keys and values of the past: the decode state of an attention layer.

A layer's cache has S slots and holds position p in slot p mod S, so one rule serves a whole context (S is its
length) and a ring buffer (S is the window). Which position a slot holds follows from how many tokens the row
has seen, so a row starts anew at position 0 without anything being cleared.
"""

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]

AXES = ("batch", "time", "kv_heads", "head_dim")


def init(batch: int, slots: int, kv_heads: int, head_width: int, dtype: jnp.dtype) -> Cache:
    """An empty cache: keys and values [B, S, G, K]."""
    shape = (batch, slots, kv_heads, head_width)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def attend(
    q_BTHK: jax.Array,
    new: Cache,
    old: Cache,
    start_B: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attention [B, T, H, K] of T new tokens to themselves (causally) and to the start_B tokens in the cache.

    new: keys and values [B, T, G, K]; old: [B, S, G, K]. Scores (scale * q.k, capped to
    softcap * tanh(score / softcap)) and softmax are float32.
    """
    B, T, H, K = q_BTHK.shape
    S, G = old["key"].shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * scale
    last_B1 = start_B[:, None] - 1
    slots_BS = last_B1 - (last_B1 - jnp.arange(S)) % S  # the newest position < start that lives in the slot
    queries_BT = start_B[:, None] + jnp.arange(T)

    def scores(k_BSGK: jax.Array, positions_BS: jax.Array) -> jax.Array:
        age_BTS = queries_BT[:, :, None] - positions_BS[:, None, :]
        seen_BTS = (age_BTS >= 0) & (positions_BS >= 0)[:, None, :]
        if window is not None:
            seen_BTS &= age_BTS < window
        s_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
        if softcap is not None:
            s_BGRTS = softcap * jnp.tanh(s_BGRTS / softcap)
        return jnp.where(seen_BTS[:, None, None], s_BGRTS, -jnp.inf)

    both = jnp.concatenate([scores(old["key"], slots_BS), scores(new["key"], queries_BT)], axis=-1)
    p_BGRTS = jax.nn.softmax(both, axis=-1).astype(q_BTHK.dtype)
    o_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", p_BGRTS[..., :S], old["value"])
    o_BTGRK += jnp.einsum("BGRTS,BSGK->BTGRK", p_BGRTS[..., S:], new["value"])
    return o_BTGRK.reshape(B, T, H, K)


def write(old: Cache, new: Cache, start_B: jax.Array, lengths_B: jax.Array) -> Cache:
    """Caches [L, B, S, G, K] of stacked layers with the first lengths_B of T new tokens [L, B, T, G, K]."""
    S, T = old["key"].shape[2], new["key"].shape[2]
    t = jnp.arange(T)
    kept_BT = (t < lengths_B[:, None]) & (t >= lengths_B[:, None] - S)  # no slot is written twice
    slots_BT = jnp.where(kept_BT, (start_B[:, None] + t) % S, S)
    rows_B1 = jnp.arange(len(start_B))[:, None]
    return jax.tree.map(lambda o, n: o.at[:, rows_B1, slots_BT].set(n, mode="drop"), old, new)
