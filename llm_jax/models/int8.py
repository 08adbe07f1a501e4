"""Weights as whole numbers of eight bits with a scale a row: a quarter of the memory."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix [I, O] of which row o is values[o] * scales[o]: [..., O, I] and [..., O].

    outputs: the dimensions that O stands for.
    """

    values: jax.Array
    scales: jax.Array
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def product(self, x_NI: jax.Array) -> jax.Array:
        """x [N, I] times the matrix, [N, O], summed in x's dtype.

        XLA on a CPU writes a converted weight down before a product but not before a sum.
        """
        weight = self.values.astype(x_NI.dtype)
        if len(x_NI) == 1 and jax.default_backend() == "cpu":
            y_NO = jnp.sum(weight * x_NI[0], axis=-1)[None]
        else:
            y_NO = x_NI @ weight.T
        return y_NO * self.scales.astype(x_NI.dtype)

    def rows(self, chosen: jax.Array) -> jax.Array:
        """Rows of the matrix's transpose: the embeddings of token ids, float32."""
        return self.values[chosen] * self.scales[chosen][..., None]
