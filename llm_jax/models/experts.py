"""A mixture of experts in place of the MLP: a router sends each token to its best few (arXiv:1701.06538)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from llm_jax.config import UserError
from llm_jax.models.blocks import ACTIVATIONS, linear
from llm_jax.models.int8 import Int8
from llm_jax.models.roles import parameter
from llm_jax.sharding import spec
from llm_jax.values import check_least

AXIS = "expert"  # of the mesh


@dataclasses.dataclass(frozen=True)
class Experts:
    """How many experts there are, how tokens are routed, and which blocks have them.

    active: experts per token. width: of each expert's hidden layer; None is the MLP's. renormalise: the
    weights of the chosen add up to 1 (Mixtral), or are the softmax over all (OLMoE). pattern: which blocks of
    the repeating pattern have experts, and which the plain MLP.
    """

    count: int = 8
    active: int = 2
    width: int | None = None
    renormalise: bool = True
    pattern: tuple[bool, ...] = (True,)

    def validate(self) -> None:
        check_least(self, "model.experts.", count=1, active=1, width=1)
        if self.active > self.count:
            raise UserError(
                f"model.experts.active={self.active}: a token can't go to more experts than "
                f"model.experts.count={self.count}"
            )
        if not any(self.pattern):
            raise UserError(f"model.experts.pattern={self.pattern} has no block with experts")


class ExpertMLP(nn.Module):
    """The gated MLP of each token's `active` experts, weighted by the router's softmax.

    Tokens are sorted by expert and multiplied in ragged groups: exactly the chosen ones are computed, and
    none is dropped.
    """

    width: int
    hidden: int
    count: int
    active: int
    renormalise: bool
    activation: Literal["swiglu", "geglu"]

    def setup(self) -> None:
        E, D, F = self.count, self.width, self.hidden
        self.router = parameter(self, "router", (D, E))
        self.expert_gate = parameter(self, "expert_gate", (E, D, F))
        self.expert_up = parameter(self, "expert_up", (E, D, F))
        self.expert_down = parameter(self, "expert_down", (E, F, D))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        weights = self.router, self.expert_gate, self.expert_up, self.expert_down
        if jax.sharding.get_abstract_mesh().shape.get(AXIS, 1) == 1:
            return self.routed(x_BTD, *weights)
        return self.shared_out(x_BTD, *weights)

    def routed(
        self,
        x_BTD: jax.Array,
        router: jax.Array,
        gate: jax.Array | Int8,
        up: jax.Array | Int8,
        down: jax.Array | Int8,
        first: jax.Array | None = None,
    ) -> jax.Array:
        """What these experts, all or those from `first` on, give to the tokens that chose them."""
        here = self.count if first is None else gate.shape[0]
        x_ND = x_BTD.reshape(-1, self.width)
        probabilities_NE = jax.nn.softmax(linear(x_ND, router).astype(jnp.float32))
        weights_NA, chosen_NA = jax.lax.top_k(probabilities_NE, self.active)
        if self.renormalise:
            weights_NA /= weights_NA.sum(-1, keepdims=True)
        if first is not None:
            mine_NA = (chosen_NA >= first) & (chosen_NA < first + here)
            weights_NA = jnp.where(mine_NA, weights_NA, 0)
            chosen_NA = jnp.where(mine_NA, chosen_NA - first, here)  # others come last, in no group
        order = jnp.argsort(chosen_NA.reshape(-1))  # by expert; slot i is token i // active
        sizes_E = jnp.bincount(chosen_NA.reshape(-1), length=here)

        def product(rows: jax.Array, weight: jax.Array | Int8) -> jax.Array:
            if isinstance(weight, Int8):
                return weight.ragged(rows, sizes_E, chosen_NA.reshape(-1)[order])
            return jax.lax.ragged_dot(rows, weight.astype(rows.dtype), sizes_E)

        rows = x_ND[order // self.active]
        h = ACTIVATIONS[self.activation](product(rows, gate)) * product(rows, up)
        y = product(h, down)[jnp.argsort(order)]
        y_NAD = y.reshape(-1, self.active, self.width) * weights_NA[..., None].astype(y.dtype)
        return y_NAD.sum(1).reshape(x_BTD.shape)

    def shared_out(self, x_BTD: jax.Array, router: jax.Array, *weights: jax.Array) -> jax.Array:
        """The same where each device of the mesh axis has some of the experts.

        Those that share out one set of experts have each other's tokens, and add up what they made of them.
        """
        mesh = jax.sharding.get_abstract_mesh()
        tokens = spec(x_BTD.shape, ("batch", "time", None), mesh)
        up = spec(weights[1].shape, ("experts", None, "mlp"), mesh)
        places = tokens, PartitionSpec(), up, up, PartitionSpec(up[0], up[2])

        def local(x_BTD: jax.Array, router: jax.Array, *weights: jax.Array) -> jax.Array:
            spread = tokens[0] is not None
            x_BTD = jax.lax.all_gather(x_BTD, AXIS, axis=0, tiled=True) if spread else x_BTD
            y_BTD = self.routed(x_BTD, router, *weights, first=jax.lax.axis_index(AXIS) * weights[0].shape[0])
            y_BTD = y_BTD if up[2] is None else jax.lax.psum(y_BTD, up[2])
            if not spread:
                return jax.lax.psum(y_BTD, AXIS)
            return jax.lax.psum_scatter(y_BTD, AXIS, scatter_dimension=0, tiled=True)

        return jax.shard_map(local, in_specs=places, out_specs=tokens, check_vma=False)(
            x_BTD, router, *weights
        )
