"""Weights of eight bits in the place of a decoder's matrices; computing and activations stay as they are."""

import math

import jax
import jax.numpy as jnp

from llm_jax.models import Params
from llm_jax.models.int8 import Int8
from llm_jax.models.roles import rule


def quantise(params: Params) -> Params:
    """A decoder's parameters with its matrices and embeddings as `Int8`.

    Each row of the transpose has the scale max|w| / 127. Routers, norms, positions and biases stay.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: quantised(path[-1].key, leaf), params)


def quantised(name: str, weight: jax.Array) -> jax.Array | Int8:
    """The same of one parameter by its name."""
    row = rule(name)
    lead = weight.ndim - len(row.axes) + row.stack  # dimensions that count matrices: layers, experts
    if name == "embedding":
        matrix, outputs = weight, weight.shape[:1]
    elif row.part in ("hidden", "output") and row.axes[-1] != "experts":
        outputs = weight.shape[lead + row.inputs :]
        flat = weight.reshape(*weight.shape[:lead], -1, math.prod(outputs))
        matrix = jnp.swapaxes(flat, -1, -2)
    else:
        return weight
    wide = matrix.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(wide).max(-1) / 127, 1e-30)
    return Int8(jnp.round(wide / scales[..., None]).astype(jnp.int8), scales, outputs)
