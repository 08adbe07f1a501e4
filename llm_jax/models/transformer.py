"""The decoder-only transformer's config: what a user chooses, what follows from it, and the rules between."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from llm_jax.config import Tagged, UserError
from llm_jax.models import DEFAULT_LAYOUT, Layout, Model, ModelConfig
from llm_jax.models.blocks import GATED, MLP, Attention, Block, Norm
from llm_jax.models.decoder import Decoder, Embed, Head
from llm_jax.models.parametrization import Parametrization, Standard
from llm_jax.models.positions import Learned, Positions, Rotary, Sinusoidal


class Normalisation(Tagged):
    """Root of the union: `--config.model.norm=layer`."""


@dataclasses.dataclass(frozen=True)
class RMSNorm(Normalisation, kind="rms"):
    """x / rms(x), times a scale (arXiv:1910.07467)."""

    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class LayerNorm(Normalisation, kind="layer"):
    """(x - mean) / deviation, times a scale and, if the model has biases, plus a shift (arXiv:1607.06450)."""

    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Transformer(ModelConfig, kind="transformer"):
    """A stack of `layers` blocks of attention and MLP.

    windows: the attention window of each block of the repeating pattern; (None,) sees everything everywhere,
    (128, None) alternates. softcap: logits are softcap * tanh(logits / softcap).
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
    norm_position: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "relu2", "swiglu", "geglu"] = "swiglu"
    qk_norm: bool = False
    bias: bool = False
    tied: bool = True
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    parametrization: Parametrization = Standard()

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
        centre = self.norm.kind == "layer"
        scaling = self.parametrization.at(self.width, self.layers, self.size_of_head)

        def norm() -> Norm:
            return Norm(self.width, self.norm.epsilon, centre, bias=centre and self.bias)

        def block(window: int | None) -> Block:
            return Block(
                mixer=Attention(
                    width=self.width,
                    heads=self.heads,
                    kv_heads=self.key_value_heads,
                    head_width=self.size_of_head,
                    scale=scaling.attention,
                    window=window,
                    qk_norm=self.qk_norm,
                    bias=self.bias,
                    epsilon=self.norm.epsilon,
                ),
                mlp=MLP(self.width, self.size_of_mlp, self.activation, self.bias),
                mixer_norm=norm(),
                mlp_norm=norm(),
                norm_position=self.norm_position,
                residual=scaling.residual,
                dropout=self.dropout,
            )

        repeats, tail = divmod(self.layers, len(self.windows))
        return Decoder(
            embed=Embed(self.vocabulary, self.width, self.positions, jnp.dtype(self.dtype)),
            pattern=tuple(block(window) for window in self.windows),
            repeats=repeats,
            tail=tail,
            norm=norm() if self.norm_position == "pre" else None,
            head=None if self.tied else Head(self.vocabulary, self.width),
            softcap=self.softcap,
            dropout=self.dropout,
            head_width=self.size_of_head,
            scaling=scaling,
            layout=layout,
        ).model()
