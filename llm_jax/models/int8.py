"""Weights as whole numbers of eight bits with a scale a row: a quarter of the memory."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.sharding import constrain

FEW = 128  # rows; of more, whole numbers are no faster


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
        """x [N, I] times the matrix, [N, O], in x's dtype.

        Of one row XLA on a CPU makes a loop over the outputs, on all cores, that converts as it reads. For
        more it writes the converted matrix down first, so a few rows are multiplied as whole numbers there.
        """
        if 1 < len(x_NI) <= FEW and jax.default_backend() == "cpu":
            y_NO = self._product_of_digits(x_NI.astype(jnp.float32)).astype(x_NI.dtype)
        else:
            y_NO = x_NI @ self.values.astype(x_NI.dtype).T
        return y_NO * self.scales.astype(x_NI.dtype)

    def _product_of_digits(self, x_NI: jax.Array) -> jax.Array:
        """x as two digits of eight bits, a row's largest entry being 127 units: x is off by unit / 508."""
        unit_N1 = jnp.maximum(jnp.abs(x_NI).max(-1, keepdims=True), 1e-30) / 127
        high_NI = jnp.round(x_NI / unit_N1)
        low_NI = jnp.round((x_NI / unit_N1 - high_NI) * 254)
        digits = jnp.concatenate([high_NI, low_NI]).astype(jnp.int8)
        sums = jax.lax.dot_general(
            digits, self.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        high_NO, low_NO = jnp.split(sums.astype(jnp.float32), 2)
        return unit_N1 * (high_NO + low_NO / 254)

    def ragged(self, x_NI: jax.Array, sizes_E: jax.Array, expert_N: jax.Array) -> jax.Array:
        """Rows x [N, I] in groups, sizes_E of each, times the matrix of their expert_N, [N, O], in x's dtype.

        For matrices [E, O, I].
        """
        wide_EIO = jnp.swapaxes(self.values, -1, -2).astype(x_NI.dtype)
        return jax.lax.ragged_dot(x_NI, wide_EIO, sizes_E) * self.scales[expert_N].astype(x_NI.dtype)

    def rows(self, chosen: jax.Array) -> jax.Array:
        """Rows of the matrix's transpose: the embeddings of token ids, float32."""
        # A gather from a table whose width is spread over devices would first be replicated.
        values, scales = constrain(self.values, "vocabulary", None), constrain(self.scales, "vocabulary")
        return values[chosen] * scales[chosen][..., None]
