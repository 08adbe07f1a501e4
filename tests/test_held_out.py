"""Scores of held-out documents: of a mixture, each source's loss and the whole."""

import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data import HeldOut
from llm_jax.held_out import score
from llm_jax.sharding import MeshConfig


def test_every_source_of_a_mixture_has_a_loss_and_the_whole_is_their_mean_over_tokens():
    # Documents 0 and 1 are the first source's, 2 the second's; a token's loss is its own number.
    tokens = np.array([[1, 3, 5], [10, 20, 99]], np.int32)
    batch = {
        "tokens": tokens,
        "mask": np.array([[1, 1, 1], [1, 1, 0]], np.float32),
        "document": np.array([[0, 1, 1], [2, 2, 2]], np.int32),
    }
    rows = lambda chosen: {name: x[chosen] for name, x in batch.items()}  # noqa: E731
    held_out = HeldOut(rows, 2, 5, 100, 3, (("0:one", 2), ("1:other", 1)))
    mesh = sharding.make_mesh(MeshConfig(data=1))
    (found,) = score(lambda params, rows: rows["tokens"].astype(float), {}, held_out, 2, mesh)
    assert (found["loss/0:one"], found["loss/1:other"]) == (3, 15)
    assert (found["held_out_tokens/0:one"], found["held_out_tokens/1:other"]) == (3, 2)
    assert found["loss"] == pytest.approx((3 * 3 + 2 * 15) / 5)
