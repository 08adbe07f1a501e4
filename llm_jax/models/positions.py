"""How a decoder knows where a token stands: rotary, learned, sinusoidal, or not at all."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llm_jax.config import Tagged, UserError
from llm_jax.values import check_least


class Positions(Tagged):
    """Root of the union: `--config.model.positions=rotary`, `--config.model.positions.theta=5e5`."""


def _check_theta(theta: float) -> None:
    if theta <= 0:
        raise UserError(
            f"model.positions.theta={theta} must be positive, such as 10000: wavelengths grow to it"
        )


class Stretch(Tagged):
    """Root: how rotary frequencies change for contexts longer than those trained on."""

    def validate(self) -> None:
        numbers = [field.name for field in dataclasses.fields(self) if field.type is not bool]
        check_least(self, "model.positions.stretch.", positive=numbers)

    def stretch(self, frequencies: jax.Array, theta: float) -> jax.Array:
        """The frequencies [K/2] as they are used."""
        raise NotImplementedError

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class NoStretch(Stretch, kind="none"):
    """Frequencies as they are."""

    def stretch(self, frequencies: jax.Array, theta: float) -> jax.Array:
        return frequencies


@dataclasses.dataclass(frozen=True)
class Linear(Stretch, kind="linear"):
    """All positions divided by `factor` (arXiv:2306.15595)."""

    factor: float = 8.0

    def stretch(self, frequencies: jax.Array, theta: float) -> jax.Array:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3(Stretch, kind="llama3"):
    """Three bands: frequencies that turn `high` times or more in the `original` context stay, those that turn
    at most `low` times are divided by `factor`, between them it goes smoothly (Llama 3.1's released code)."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def validate(self) -> None:
        super().validate()
        if self.high <= self.low:
            raise UserError(f"model.positions.stretch.high is {self.high}; it lies above low={self.low}")

    def stretch(self, frequencies: jax.Array, theta: float) -> jax.Array:
        turns = self.original * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn(Stretch, kind="yarn"):
    """Dimensions that turn `fast` times in the `original` context or more stay, those that turn at most
    `slow` times are divided by `factor`, with a ramp between them (arXiv:2309.00071, section 3.2).

    magnitude: what cosines and sines are multiplied by; None is 1 + 0.1 ln(factor) (section 3.4). whole: the
    ends of the ramp are whole dimensions.
    """

    factor: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    original: int = 4096
    magnitude: float | None = None
    whole: bool = True

    def stretch(self, frequencies: jax.Array, theta: float) -> jax.Array:
        size = 2 * len(frequencies)

        def dimension(turns: float) -> float:
            return size * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))

        first, last = dimension(self.fast), dimension(self.slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        divided = jnp.clip((jnp.arange(size // 2) - first) / max(last - first, 1e-3), 0, 1)
        return frequencies * (1 - divided + divided / self.factor)

    def amplitude(self) -> float:
        return 1 + 0.1 * math.log(self.factor) if self.magnitude is None else self.magnitude


@dataclasses.dataclass(frozen=True)
class Rotary(Positions, kind="rotary"):
    """Queries and keys turned by angles that grow with position (RoFormer, arXiv:2104.09864).

    The pairs that turn are (i, i + K/2), as in Llama, not neighbours.
    """

    theta: float = 10_000.0
    stretch: Stretch = NoStretch()

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


def frequencies(size: int, theta: float) -> jax.Array:
    """[size/2]: how far each pair turns from one position to the next, theta^(-2i/size)."""
    return theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def angles(positions_BT: jax.Array, frequencies_K: jax.Array) -> jax.Array:
    """[B, T, K]: positions times frequencies."""
    return positions_BT[..., None].astype(jnp.float32) * frequencies_K


def sinusoids(positions_BT: jax.Array, width: int, theta: float) -> jax.Array:
    """[B, T, width]: the sines of all frequencies, then the cosines."""
    turned = angles(positions_BT, frequencies(width, theta))
    return jnp.concatenate([jnp.sin(turned), jnp.cos(turned)], axis=-1)


def rotation(positions_BT: jax.Array, head_width: int, rotary: Rotary) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, head_width/2] for `rotate`, computed once for all layers."""
    used = rotary.stretch.stretch(frequencies(head_width, rotary.theta), rotary.theta)
    turned, amplitude = angles(positions_BT, used)[:, :, None, :], rotary.stretch.amplitude()
    return amplitude * jnp.cos(turned), amplitude * jnp.sin(turned)


def rotate(x_BTHK: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each pair (x[i], x[i + K/2]) turned by its angle, in float32."""
    cos, sin = turn
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)
