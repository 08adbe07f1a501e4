"""A mixture of experts in place of the MLP: a router sends each token to its best few (arXiv:1701.06538)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.config import UserError
from llm_jax.models.blocks import ACTIVATIONS, linear
from llm_jax.models.int8 import Int8
from llm_jax.models.roles import parameter
from llm_jax.values import check_least


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
        x_ND = x_BTD.reshape(-1, self.width)
        probabilities_NE = jax.nn.softmax(linear(x_ND, self.router).astype(jnp.float32))
        weights_NA, chosen_NA = jax.lax.top_k(probabilities_NE, self.active)
        if self.renormalise:
            weights_NA /= weights_NA.sum(-1, keepdims=True)
        order = jnp.argsort(chosen_NA.reshape(-1))  # by expert; slot i is token i // active
        sizes_E = jnp.bincount(chosen_NA.reshape(-1), length=self.count)

        def product(rows: jax.Array, weight: jax.Array | Int8) -> jax.Array:
            if isinstance(weight, Int8):
                return weight.ragged(rows, sizes_E, chosen_NA.reshape(-1)[order])
            return jax.lax.ragged_dot(rows, weight.astype(rows.dtype), sizes_E)

        rows = x_ND[order // self.active]
        h = ACTIVATIONS[self.activation](product(rows, self.expert_gate)) * product(rows, self.expert_up)
        y = product(h, self.expert_down)[jnp.argsort(order)]
        y_NAD = y.reshape(-1, self.active, self.width) * weights_NA[..., None].astype(y.dtype)
        return y_NAD.sum(1).reshape(x_BTD.shape)
