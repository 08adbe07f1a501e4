"""Weights of eight bits in the place of a decoder's matrices; computing and activations stay as they are."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models import Params
from llm_jax.models.int8 import Int8
from llm_jax.models.roles import rule


def quantise(params: Params) -> Params:
    """A decoder's parameters with its matrices and embeddings as `Int8`.

    Each row of the transpose has the scale max|w| / 127. Experts, the router, norms and biases stay.
    """

    def leaf(path: tuple, weight: jax.Array) -> Any:
        name = path[-1].key
        row = rule(name)
        stack = weight.ndim - len(row.axes)
        if name == "embedding":
            matrix, outputs = weight, weight.shape[:1]
        elif row.part in ("hidden", "output") and "experts" not in row.axes:
            lead, rest = weight.shape[:stack], weight.shape[stack:]
            outputs = rest[row.inputs :]
            flat = weight.reshape(*lead, -1, math.prod(outputs))
            matrix = jnp.swapaxes(flat, -1, -2)
        else:
            return weight
        wide = matrix.astype(jnp.float32)
        scales = jnp.maximum(jnp.abs(wide).max(-1) / 127, 1e-30)
        return Int8(jnp.round(wide / scales[..., None]).astype(jnp.int8), scales, outputs)

    return jax.tree_util.tree_map_with_path(leaf, params)
