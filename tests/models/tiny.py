"""Parameters for tests, from numpy: nothing to compile, and no scale or bias is trivial."""

import jax
import jax.numpy as jnp
import numpy as np


def parameters(model, seed=0):
    """A tree like `model.init`'s of normal numbers with deviation 0.2, norms' scales around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        middle = 1.0 if "scale" in path[-1].key else 0.0
        return jnp.asarray(middle + 0.2 * rng.normal(size=shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))
