"""How a decoder knows where a token stands: rotary, learned, sinusoidal, or not at all."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.config import Tagged, UserError


class Positions(Tagged):
    """Root of the union: `--config.model.positions=rotary`, `--config.model.positions.theta=5e5`."""


def _check_theta(theta: float) -> None:
    if theta <= 0:
        raise UserError(
            f"model.positions.theta={theta} must be positive, such as 10000: wavelengths grow to it"
        )


@dataclasses.dataclass(frozen=True)
class Rotary(Positions, kind="rotary"):
    """Queries and keys turned by angles that grow with position (RoFormer, arXiv:2104.09864).

    The pairs that turn are (i, i + K/2), as in Llama, not neighbours.
    """

    theta: float = 10_000.0

    def validate(self) -> None:
        _check_theta(self.theta)


@dataclasses.dataclass(frozen=True)
class Learned(Positions, kind="learned"):
    """A learned vector for each position below `length`, added to the embedding (GPT-2)."""

    length: int = 1024

    def validate(self) -> None:
        if self.length < 1:
            raise UserError(f"model.positions.length={self.length}: learned positions need at least one")


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions, kind="sinusoidal"):
    """Fixed sines and cosines added to the embedding times sqrt(width) (arXiv:1706.03762, 3.4 and 3.5)."""

    theta: float = 10_000.0

    def validate(self) -> None:
        _check_theta(self.theta)


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions, kind="none"):
    """Nothing: the causal mask alone tells order (arXiv:2305.19466)."""


def angles(positions_BT: jax.Array, size: int, theta: float) -> jax.Array:
    """[B, T, size/2]: position times the frequencies theta^(-2i/size)."""
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return positions_BT[..., None].astype(jnp.float32) * frequencies


def sinusoids(positions_BT: jax.Array, width: int, theta: float) -> jax.Array:
    """[B, T, width]: the sines of all frequencies, then the cosines."""
    turned = angles(positions_BT, width, theta)
    return jnp.concatenate([jnp.sin(turned), jnp.cos(turned)], axis=-1)


def rotation(positions_BT: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, head_width/2] for `rotate`, computed once for all layers."""
    turned = angles(positions_BT, head_width, theta)[:, :, None, :]
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x_BTHK: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each pair (x[i], x[i + K/2]) turned by its angle, in float32."""
    cos, sin = turn
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)
