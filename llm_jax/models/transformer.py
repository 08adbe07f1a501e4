"""The decoder-only transformer's config: what a user chooses, what follows from it, and the rules between."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from llm_jax.config import Tagged, UserError
from llm_jax.models import DEFAULT_LAYOUT, Layout, Model, ModelConfig
from llm_jax.models.blocks import GATED, MLP, Attention, Block, Norm
from llm_jax.models.decoder import Decoder, Embed, Head
from llm_jax.models.experts import ExpertMLP, Experts
from llm_jax.models.parametrization import Parametrization, Scaling, Standard
from llm_jax.models.positions import Learned, Positions, Rotary, Sinusoidal
from llm_jax.values import check_least


class Normalisation(Tagged):
    """Root of the union: `--config.model.norm=layer`."""


@dataclasses.dataclass(frozen=True)
class RMSNorm(Normalisation, kind="rms"):
    """x / rms(x), times a scale (arXiv:1910.07467). gain: the scale is stored less 1, as Gemma's."""

    epsilon: float = 1e-5
    gain: bool = False


@dataclasses.dataclass(frozen=True)
class LayerNorm(Normalisation, kind="layer"):
    """(x - mean) / deviation, times a scale and, if the model has biases, plus a shift (arXiv:1607.06450)."""

    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Attending:
    """What attention rarely differs in.

    scale, softcap: a score is scale * q.k (None: as the parametrisation says), capped to softcap *
    tanh(score / softcap). bias: on which projections, if not as the model's `bias`. norm_over: what a norm of
    queries and keys spans, each head or all heads at once (OLMo 2).
    """

    scale: float | None = None
    softcap: float | None = None
    bias: Literal["as_model", "none", "qkv", "all"] = "as_model"
    norm_over: Literal["head", "heads"] = "head"

    def validate(self) -> None:
        check_least(self, "model.attention.", positive=("scale", "softcap"))


@dataclasses.dataclass(frozen=True)
class Transformer(ModelConfig, kind="transformer"):
    """A stack of `layers` blocks of attention and MLP.

    windows: the attention window of each block of the repeating pattern; (None,) sees everything everywhere,
    (128, None) alternates. rotations: the rotary positions of each block of the pattern where blocks differ,
    none for a block without. softcap: logits are softcap * tanh(logits / softcap). multiplier: what
    embeddings are multiplied by.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    vocabulary: int | None = None
    positions: Positions = dataclasses.field(default_factory=Rotary)
    norm: Normalisation = dataclasses.field(default_factory=RMSNorm)
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    activation: Literal["gelu", "gelu_erf", "relu", "relu2", "swiglu", "geglu"] = "swiglu"
    qk_norm: bool = False
    bias: bool = False
    tied: bool = True
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    parametrization: Parametrization = Standard()
    attention: Attending = Attending()
    rotations: tuple[Rotary | None, ...] = ()
    multiplier: float = 1.0
    experts: Experts | None = None

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size_of_head(self) -> int:
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def size_of_mlp(self) -> int:
        """4 x width, or, gated, 8/3 x width (as many parameters), rounded up to a multiple of 32."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 96) * 32 if self.activation in GATED else 4 * self.width

    @property
    def period(self) -> int:
        """The length of the repeating pattern of blocks."""
        patterns = self.windows, self.rotations, self.experts.pattern if self.experts else ()
        return math.lcm(*(len(pattern) or 1 for pattern in patterns))

    def window(self, layer: int) -> int | None:
        return self.windows[layer % len(self.windows)]

    def rotary(self, layer: int) -> Rotary | None:
        if self.rotations:
            return self.rotations[layer % len(self.rotations)]
        return self.positions if isinstance(self.positions, Rotary) else None

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.pattern[layer % len(self.experts.pattern)]

    @property
    def size_of_expert(self) -> int:
        return self.experts.width or self.size_of_mlp

    @property
    def attention_bias(self) -> str:
        """Which projections of attention have a bias: none, qkv or all."""
        bias = self.attention.bias
        return bias if bias != "as_model" else "all" if self.bias else "none"

    def validate(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "vocabulary"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"model.{name}={size} must be at least 1")
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"{self._nearest_heads()} does, or set model.head_width"
            )
        if self.heads % self.key_value_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}: "
                "each key/value head serves the same number of queries"
            )
        if isinstance(self.positions, Rotary) and self.size_of_head % 2:
            raise UserError(
                f"a head of {self.size_of_head} can't be rotary: model.width / model.heads (or "
                "model.head_width) must be even"
            )
        if isinstance(self.positions, Sinusoidal) and self.width % 2:
            raise UserError(f"model.width={self.width} must be even for sinusoidal positions")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise UserError(f"model.windows={self.windows}: one window of at least 1 (or none) per block")
        if self.norm.epsilon <= 0:
            raise UserError(f"model.norm.epsilon={self.norm.epsilon} must be positive, such as 1e-5")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.softcap is not None and self.softcap <= 0:
            raise UserError(f"model.softcap={self.softcap} must be positive, or none")
        check_least(self, "model.", positive=("multiplier",))
        if self.rotations and not isinstance(self.positions, Rotary):
            raise UserError(f"model.rotations go with model.positions=rotary, not {self.positions.kind}")
        if self.experts and self.activation not in GATED:
            raise UserError(f"model.activation={self.activation}: experts are {' or '.join(GATED)}")
        self.parametrization.check_model(self)

    def _nearest_heads(self) -> int:
        divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
        return min(divisors, key=lambda heads: abs(heads - self.heads))

    def resolve(self, data: Any) -> "Transformer":
        """With the data's vocabulary; raises UserError where the data needs more token ids or positions."""
        vocabulary = data.vocabulary if self.vocabulary is None else self.vocabulary
        if vocabulary < data.vocabulary:
            raise UserError(
                f"model.vocabulary={vocabulary} is smaller than the data's {data.vocabulary} token ids"
            )
        length = getattr(data, "sequence_length", 0)
        if isinstance(self.positions, Learned) and self.positions.length < length:
            raise UserError(
                f"model.positions.length={self.positions.length} is shorter than sequences of {length}"
            )
        return dataclasses.replace(self, vocabulary=vocabulary)

    def build(self, layout: Layout = DEFAULT_LAYOUT) -> Model:
        """The functions of this model; `vocabulary` must be known (`resolve`)."""
        if self.vocabulary is None:
            raise UserError("model.vocabulary is not set, and there is no data to take it from")
        scaling = self.parametrization.at(self.width, self.layers, self.size_of_head)
        dtype = jnp.dtype(self.dtype)
        return Decoder(
            embed=Embed(self.vocabulary, self.width, self.positions, dtype, self.multiplier),
            pattern=tuple(self._block(layer, scaling) for layer in range(self.period)),
            repeats=self.layers // self.period,
            tail=self.layers % self.period,
            norm=None if self.norm_position == "post" else self._norm(),
            head=None if self.tied else Head(self.vocabulary, self.width),
            softcap=self.softcap,
            dropout=self.dropout,
            scaling=scaling,
            layout=layout,
        ).model()

    def _norm(self) -> Norm:
        centre = self.norm.kind == "layer"
        gain = not centre and self.norm.gain
        return Norm(self.width, self.norm.epsilon, centre, bias=centre and self.bias, gain=gain)

    def _block(self, layer: int, scaling: Scaling) -> Block:
        """The block at a place of the pattern."""
        rare, experts, sandwich = self.attention, self.experts, self.norm_position == "sandwich"
        if self.has_experts(layer):
            routing = experts.count, experts.active, experts.renormalise
            mlp = ExpertMLP(self.width, self.size_of_expert, *routing, self.activation)
        else:
            mlp = MLP(self.width, self.size_of_mlp, self.activation, self.bias)
        return Block(
            mixer=Attention(
                width=self.width,
                heads=self.heads,
                kv_heads=self.key_value_heads,
                head_width=self.size_of_head,
                scale=scaling.attention if rare.scale is None else rare.scale,
                softcap=rare.softcap,
                window=self.window(layer),
                rotary=self.rotary(layer),
                qk_norm=rare.norm_over if self.qk_norm else "none",
                gain=self.norm.kind == "rms" and self.norm.gain,
                bias=self.attention_bias != "none",
                bias_out=self.attention_bias == "all",
                epsilon=self.norm.epsilon,
            ),
            mlp=mlp,
            mixer_norm=self._norm(),
            mlp_norm=self._norm(),
            mixer_out_norm=self._norm() if sandwich else None,
            mlp_out_norm=self._norm() if sandwich else None,
            norm_position=self.norm_position,
            residual=scaling.residual,
            dropout=self.dropout,
        )
