"""A matrix with a product of two thin ones beside it: what lora.py learns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """matrix [*I, *O] + thin [*I, R] times wide [R, *O], never added up."""

    matrix: jax.Array
    thin: jax.Array
    wide: jax.Array
