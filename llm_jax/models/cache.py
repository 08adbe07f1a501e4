"""Keys and values of the past: the decode state of an attention layer.

A layer's cache has S slots and holds position p in slot p mod S, so one rule serves a whole context (S is its
length) and a ring buffer (S is the window). Which position a slot holds follows from how many tokens the row
has seen, so a row starts anew at position 0 without anything being cleared.
"""

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]

AXES = {
    "key": ("batch", "kv_heads", "head_dim", "time"),
    "value": ("batch", "kv_heads", "time", "head_dim"),
}


def init(batch: int, slots: int, kv_heads: int, head_width: int, dtype: jnp.dtype) -> Cache:
    """An empty cache: keys [B, G, K, S] and values [B, G, S, K], each as the right side of its product."""
    lead = batch, kv_heads
    return {
        "key": jnp.zeros((*lead, head_width, slots), dtype),
        "value": jnp.zeros((*lead, slots, head_width), dtype),
    }


def attend(
    q_BTHK: jax.Array,
    new: Cache,
    old: Cache,
    start_B: jax.Array,
    lengths_B: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, Cache]:
    """Attention [B, T, H, K] of T new tokens to themselves (causally) and to the start_B tokens in the cache,

    and the cache with them. new: keys and values [B, T, G, K], of which the first lengths_B count. Scores
    (scale * q.k, capped to softcap * tanh(score / softcap)) and softmax are float32.
    """
    B, T, H, K = q_BTHK.shape
    G, S = old["value"].shape[1:3]
    q_BGRTK = jnp.moveaxis(q_BTHK.reshape(B, T, G, H // G, K) * scale, 1, 3)
    queries_BT = start_B[:, None] + jnp.arange(T)

    def slots(last_B: jax.Array) -> jax.Array:
        """[B, S]: the newest position up to the last that lives in each slot."""
        return last_B[:, None] - (last_B[:, None] - jnp.arange(S)) % S

    written = write(old, new, start_B, lengths_B)
    if window is None or T == 1:
        # Nothing that a query sees was overwritten. As nobody needs the old cache, XLA changes it in place.
        parts = [(written, slots(start_B + lengths_B - 1))]
    else:
        turned = {"key": jnp.transpose(new["key"], (0, 2, 3, 1)), "value": jnp.swapaxes(new["value"], 1, 2)}
        parts = [(old, slots(start_B - 1)), (turned, queries_BT)]

    def scores(k_BGKS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        age_BTS = queries_BT[:, :, None] - positions_BS[:, None, :]
        seen_BTS = (age_BTS >= 0) & (positions_BS >= 0)[:, None, :]
        if window is not None:
            seen_BTS &= age_BTS < window
        s_BGRTS = _product(q_BGRTK, k_BGKS)
        if softcap is not None:
            s_BGRTS = softcap * jnp.tanh(s_BGRTS / softcap)
        # Not -inf: a row that isn't decoded may see nothing.
        return jnp.where(seen_BTS[:, None, None], s_BGRTS, jnp.finfo(jnp.float32).min)

    every = jnp.concatenate([scores(part["key"], positions) for part, positions in parts], axis=-1)
    p_BGRTS = jax.nn.softmax(every, axis=-1).astype(q_BTHK.dtype)
    values = jnp.concatenate([part["value"] for part, _ in parts], axis=2)
    o_BGRTK = _product(p_BGRTS, values).astype(q_BTHK.dtype)
    return jnp.moveaxis(o_BGRTK, 3, 1).reshape(B, T, H, K), written


def _product(x_BGRTI: jax.Array, y_BGIO: jax.Array) -> jax.Array:
    """[B, G, R, T, O], float32.

    For a product with one row XLA on a CPU first copies y in another order; a sum reads it as it lies.
    """
    if x_BGRTI.shape[3] == 1 and jax.default_backend() == "cpu":
        wide = x_BGRTI.astype(jnp.float32)[..., None] * y_BGIO[:, :, None, None]
        return wide.sum(-2)
    return jnp.einsum("BGRTI,BGIO->BGRTO", x_BGRTI, y_BGIO, preferred_element_type=jnp.float32)


def write(old: Cache, new: Cache, start_B: jax.Array, lengths_B: jax.Array) -> Cache:
    """A cache with the first lengths_B of T new tokens [B, T, G, K]."""
    S, T = old["value"].shape[2], new["value"].shape[1]
    t = jnp.arange(T)
    kept_BT = (t < lengths_B[:, None]) & (t >= lengths_B[:, None] - S)  # no slot is written twice
    slots_BT = jnp.where(kept_BT, (start_B[:, None] + t) % S, S)
    rows_B1 = jnp.arange(len(start_B))[:, None]
    return {
        "key": old["key"].at[rows_B1, :, :, slots_BT].set(new["key"], mode="drop"),
        "value": old["value"].at[rows_B1, :, slots_BT].set(new["value"], mode="drop"),
    }
