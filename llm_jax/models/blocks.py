"""One block of a decoder: a mixer, which looks along time, and an MLP, each with its norm and residual."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.kernels.attention import attend
from llm_jax.models import cache
from llm_jax.models.adapted import Adapted
from llm_jax.models.int8 import Int8
from llm_jax.models.positions import Rotary, rotate
from llm_jax.models.roles import parameter
from llm_jax.sharding import constrain

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")  # GLU variants (arXiv:2002.05202): activation(x gate) * (x up)


@dataclasses.dataclass(frozen=True)
class Context:
    """What all blocks see of a batch.

    turns: cosines and sines of each kind of rotary positions. segments: [B, T], tokens see their own.
    start, lengths: [B], while decoding, how many tokens of each row the state already holds, and how many of
    the new ones count.
    """

    turns: dict[Rotary, tuple[jax.Array, jax.Array]]
    segments: jax.Array | None = None
    start: jax.Array | None = None
    lengths: jax.Array | None = None
    attention: str = "auto"


def linear(
    x: jax.Array, weight: jax.Array | Int8 | Adapted, bias: jax.Array | None = None, inputs: int = 1
) -> jax.Array:
    """x [..., *I] times weight [*I, *O] plus bias [*O], in x's dtype; `inputs` is the number of dimensions I.

    As one product of two plain matrices: left to einsum, the weight's gradient sums over two dimensions, and
    XLA on a CPU copies both factors transposed for that (2.7 times slower).
    """
    if isinstance(weight, Adapted):
        beside = linear(linear(x, weight.thin, inputs=inputs), weight.wide)
        return linear(x, weight.matrix, bias, inputs) + beside
    lead, size = x.shape[: x.ndim - inputs], math.prod(x.shape[x.ndim - inputs :])
    if isinstance(weight, Int8):
        y, outputs = weight.product(x.reshape(-1, size)), weight.outputs
    else:
        y = x.reshape(-1, size) @ weight.reshape(size, -1).astype(x.dtype)
        outputs = weight.shape[inputs:]
    y = y.reshape(*lead, *outputs)
    return y if bias is None else y + bias.astype(x.dtype)


def normalise(
    x: jax.Array, scale: jax.Array, shift: jax.Array | None, epsilon: float, centre: bool
) -> jax.Array:
    """LayerNorm (centre) or RMSNorm (arXiv:1910.07467) over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    if centre:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon) * scale
    return (wide if shift is None else wide + shift).astype(x.dtype)


def gained(gain: jax.Array) -> jax.Array:
    """The scale of a norm that stores how far from 1 it is (Gemma)."""
    return 1.0 + gain.astype(jnp.float32)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Entries zeroed with probability `rate` and the rest scaled up; without a key, nothing."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.size,)).reshape(x.shape)  # see roles.draw on generators
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm with its scale and, with `bias`, its shift. gain: the scale is 1 + a parameter."""

    width: int
    epsilon: float
    centre: bool
    bias: bool = False
    gain: bool = False

    def setup(self) -> None:
        self.scale = parameter(self, "gain" if self.gain else "scale", (self.width,))
        self.shift = parameter(self, "shift", (self.width,)) if self.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = gained(self.scale) if self.gain else self.scale
        return normalise(x, scale, self.shift, self.epsilon, self.centre)


class Attention(nn.Module):
    """Causal attention of `heads` queries that share `kv_heads` keys and values (MHA, GQA, MQA).

    A score is scale * q.k, capped to softcap * tanh(score / softcap). window: a token sees itself and the
    window-1 tokens before it. rotary: how queries and keys are turned, if they are. qk_norm: an RMSNorm over
    each head's query and key, or over those of all heads at once, before they are turned. bias: on queries,
    keys and values, bias_out: on the result.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rotary: Rotary | None = None
    qk_norm: Literal["none", "head", "heads"] = "none"
    gain: bool = False
    bias: bool = False
    bias_out: bool = False
    epsilon: float = 1e-5

    def setup(self) -> None:
        D, H, G, K = self.width, self.heads, self.kv_heads, self.head_width
        self.query = parameter(self, "query", (D, H, K))
        self.key = parameter(self, "key", (D, G, K))
        self.value = parameter(self, "value", (D, G, K))
        self.out = parameter(self, "out", (H, K, D))
        self.query_bias = parameter(self, "query_bias", (H, K)) if self.bias else None
        self.key_bias = parameter(self, "key_bias", (G, K)) if self.bias else None
        self.value_bias = parameter(self, "value_bias", (G, K)) if self.bias else None
        self.out_bias = parameter(self, "out_bias", (D,)) if self.bias_out else None
        kind = "gain" if self.gain else "scale"
        if self.qk_norm == "head":
            self.norms = parameter(self, f"query_{kind}", (K,)), parameter(self, f"key_{kind}", (K,))
        elif self.qk_norm == "heads":
            self.norms = parameter(self, f"queries_{kind}", (H, K)), parameter(self, f"keys_{kind}", (G, K))

    def project(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], normed and turned."""
        q_BTHK = linear(x_BTD, self.query, self.query_bias)
        k_BTGK = linear(x_BTD, self.key, self.key_bias)
        v_BTGK = linear(x_BTD, self.value, self.value_bias)
        if self.qk_norm != "none":
            q_BTHK, k_BTGK = self.normed(q_BTHK, self.norms[0]), self.normed(k_BTGK, self.norms[1])
        if self.rotary is not None:
            turn = context.turns[self.rotary]
            q_BTHK, k_BTGK = rotate(q_BTHK, turn), rotate(k_BTGK, turn)
        q_BTHK = constrain(q_BTHK, "batch", "time", "heads", "head_dim")
        k_BTGK = constrain(k_BTGK, "batch", "time", "kv_heads", "head_dim")
        v_BTGK = constrain(v_BTGK, "batch", "time", "kv_heads", "head_dim")
        return q_BTHK, k_BTGK, v_BTGK

    def normed(self, x_BTHK: jax.Array, scale: jax.Array) -> jax.Array:
        """The RMSNorm of queries or keys over the dimensions that `scale` has."""
        wide = x_BTHK.reshape(*x_BTHK.shape[:2], -1, scale.size)
        scale = (gained(scale) if self.gain else scale).reshape(-1)
        return normalise(wide, scale, None, self.epsilon, centre=False).reshape(x_BTHK.shape)

    def __call__(self, x_BTD: jax.Array, context: Context, state: Any) -> tuple[jax.Array, Any]:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, context)
        if state is None:
            told, o_BTHK = None, self.attend(q_BTHK, k_BTGK, v_BTGK, context)
        else:
            new = {"key": k_BTGK, "value": v_BTGK}
            rule = self.window, self.scale, self.softcap
            o_BTHK, written = cache.attend(q_BTHK, new, state, context.start, context.lengths, *rule)
            told = {"new": new, "written": written}
        return linear(o_BTHK, self.out, self.out_bias, inputs=2), told

    def attend(self, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, context: Context) -> jax.Array:
        """What queries make of keys and values."""
        rule = {"window": self.window, "softcap": self.softcap, "scale": self.scale}
        return attend(q_BTHK, k_BTGK, v_BTGK, segments=context.segments, kind=context.attention, **rule)

    def weights(self, q_BTHK: jax.Array, k_BTGK: jax.Array, context: Context) -> jax.Array:
        """How much of each token goes into a query's result, [B, H, T, T]: attention to the rows of 1."""
        B, T, G, _ = k_BTGK.shape
        one_BTGT = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, G, T))
        return self.attend(q_BTHK, k_BTGK, one_BTGT, context).swapaxes(1, 2)

    def init_state(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Room for `length` tokens, or for as many as the window sees."""
        return cache.init(batch, min(length, self.window or length), self.kv_heads, self.head_width, dtype)


class MLP(nn.Module):
    """The feed-forward layer; gated activations multiply by a second projection."""

    width: int
    hidden: int
    activation: Literal["gelu", "gelu_erf", "relu", "relu2", "swiglu", "geglu"]
    bias: bool = False

    def setup(self) -> None:
        self.gated = self.activation in GATED
        self.up = parameter(self, "up", (self.width, self.hidden))
        self.down = parameter(self, "down", (self.hidden, self.width))
        self.gate = parameter(self, "gate", (self.width, self.hidden)) if self.gated else None
        if self.bias:
            self.up_bias = parameter(self, "up_bias", (self.hidden,))
            self.down_bias = parameter(self, "down_bias", (self.width,))
            self.gate_bias = parameter(self, "gate_bias", (self.hidden,)) if self.gated else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        h_BTF = linear(x_BTD, self.up, self.up_bias if self.bias else None)
        if self.gated:
            h_BTF *= activate(linear(x_BTD, self.gate, self.gate_bias if self.bias else None))
        else:
            h_BTF = activate(h_BTF)
        h_BTF = constrain(h_BTF, "batch", "time", "mlp")
        return linear(h_BTF, self.down, self.down_bias if self.bias else None)


class Block(nn.Module):
    """A mixer and an MLP f, each with norms n and m around it; r is `residual`.

    pre: x + r f(n(x)). post: n(x + r f(x)), as at first. output: x + r n(f(x)) (OLMo 2). sandwich:
    x + r m(f(n(x))) (Gemma 2), where m are mixer_out_norm and mlp_out_norm.
    """

    mixer: nn.Module
    mlp: nn.Module
    mixer_norm: nn.Module
    mlp_norm: nn.Module
    mixer_out_norm: nn.Module | None = None
    mlp_out_norm: nn.Module | None = None
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    residual: float = 1.0
    dropout: float = 0.0

    def __call__(
        self, x_BTD: jax.Array, context: Context, state: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Hidden out, and what is new to the state beside the state that it makes; key drives dropout."""
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, new = self.mixer(self.enter(self.mixer_norm, x_BTD), context, state)
        x_BTD = self.leave(self.mixer_norm, self.mixer_out_norm, x_BTD, y_BTD, keys[0])
        y_BTD = self.mlp(self.enter(self.mlp_norm, x_BTD))
        return self.leave(self.mlp_norm, self.mlp_out_norm, x_BTD, y_BTD, keys[1]), new

    def enter(self, norm: nn.Module, x_BTD: jax.Array) -> jax.Array:
        """What a branch is given of the stream."""
        return norm(x_BTD) if self.norm_position in ("pre", "sandwich") else x_BTD

    def leave(
        self,
        norm: nn.Module,
        out_norm: nn.Module | None,
        x_BTD: jax.Array,
        y_BTD: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        """The stream after a branch that gave y."""
        if self.norm_position in ("output", "sandwich"):
            y_BTD = (norm if self.norm_position == "output" else out_norm)(y_BTD)
        x_BTD = constrain(x_BTD + self.residual * dropout(y_BTD, self.dropout, key), "batch", "time", "embed")
        return norm(x_BTD) if self.norm_position == "post" else x_BTD
