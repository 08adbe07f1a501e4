"""Looking inside a model: where its heads look, what it would say after each layer, which tokens are near.

seen = look(opened, opened.encode("Paris is in"))
seen.attention[layer, head]                     # rows are queries, columns what they look at
lens(opened, seen.stream[layer]).argmax(-1)     # what it would say if it ended here
neighbours(opened, token)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import UserError
from llm_jax.inference.generation import computing
from llm_jax.inference.opening import Opened
from llm_jax.models.int8 import Int8


class Inside(NamedTuple):
    """What a text of T tokens leaves in a model of L layers.

    attention: [L, H, T, T], how much of each token (last axis) goes into what a query's head gives. stream:
    [L + 1, T, D], the embedding and then what stands after each layer.
    """

    attention: np.ndarray
    stream: np.ndarray


def look(opened: Opened, ids: np.ndarray) -> Inside:
    """Reads ids [T]; raises UserError for those it can't read, and a model that doesn't show itself."""
    opened.check(ids[None])
    model = opened.config.build()
    if model.activations is None or model.finish is None:
        raise UserError(f"{opened.name} is a {opened.config.kind}, which doesn't show its activations")
    with computing(opened.config, opened.mesh):
        found = model.activations(opened.params, {"tokens": jnp.asarray(ids[None])}, attention=True)
    stream = jnp.concatenate([found["embedding"], found["stream"]])
    return Inside(*(np.asarray(x[:, 0], np.float32) for x in (found["attention"], stream)))


def lens(opened: Opened, stream: np.ndarray) -> np.ndarray:
    """Float32 logits [..., V] of a model that ended at a stream [..., D], after any layer.

    The logit lens: the last norm and the head, applied early (nostalgebraist 2020).
    """
    model = opened.config.build()
    x = jnp.asarray(stream, opened.config.dtype)
    with computing(opened.config, opened.mesh):
        return np.asarray(model.unembed(opened.params, model.finish(opened.params, x)))


def neighbours(opened: Opened, token: int, count: int = 8) -> list[tuple[int, float]]:
    """The tokens whose embeddings point most nearly where a token's does, each with the cosine.

    Fewer than `count` where the vocabulary has no more.
    """
    table = opened.params["embed"]["embedding"]
    table = table.rows(jnp.arange(len(table.values))) if isinstance(table, Int8) else table
    table = jnp.asarray(table, jnp.float32)
    table = table / jnp.maximum(jnp.linalg.norm(table, axis=-1, keepdims=True), 1e-30)
    count = min(count, len(table) - 1)
    with computing(opened.config, opened.mesh):
        cosines, ids = jax.lax.top_k((table @ table[token]).at[token].set(-jnp.inf), count)
    return list(zip(ids.tolist(), cosines.tolist(), strict=True))
