"""Parametrisations: how a model's numbers go with its width and depth, so that one rate serves every size.

Each is a table of powers of m = width / base_width (and of l = layers / base_layers), by what a parameter is:

    embedding   the token table: its rows are as many at every width
    hidden      matrices of the blocks: both sides grow
    output      the untied head: its input side grows
    vector      norms, biases, learned positions

and by how an optimizer steps: "adam" (every entry by about the rate: AdamW, Lion, schedule-free), "sgd" (by
the gradient), "muon" (matrices by their spectral norm). At the base shape everything is as in the standard
one. Rates are multiplied by `rate`, decay by its inverse, so that what a step shrinks by stays the same.

    powers of m           standard   mup                         per_layer (a = 1 full, 1/2 no alignment)
    deviation at start    -1/2       0 embedding, output         0 embedding
                                     -1/2 hidden                 -1/2 hidden, output
    logits                0          -1                          0
    scores                K^-1/2     K^-1                        K^-1/2
    rate, adam            0          -1 hidden, 0 else           -a hidden, output; 0 else
    rate, sgd             0          0 hidden, 1 else            1/2 - a hidden; -a output; 1/2 else
    rate, muon            0          0                           none
    epsilon               0          -1                          0 output, -1/2 else

K is the width of a head. `completep` is mup, and in the blocks multiplies rates by l^(alpha - 1), epsilon by
l^-alpha and what a branch adds by l^-alpha. Epsilon goes as gradients do. Adafactor has a rule in the
standard one only: its steps follow a parameter's own scale, and blocks' last matrices start at zero.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from llm_jax.config import Tagged, UserError
from llm_jax.models import Multipliers
from llm_jax.values import check_least

Part = Literal["embedding", "hidden", "output", "vector"]
Powers = dict[Part, float]
ALL = frozenset(("adam", "sgd", "muon", "adafactor"))


class Scaling(NamedTuple):
    """A parametrisation at one shape.

    attention, residual, output: what scores, what a branch adds, and logits are multiplied by. init: by part,
    what a deviation is multiplied by beside the role's rule. outer, blocks: {part: {steps: Multipliers}} of
    leaves outside and inside the blocks. What isn't named is 1.
    """

    attention: float
    residual: float = 1.0
    output: float = 1.0
    init: Mapping[str, float] = types.MappingProxyType({})
    outer: Mapping[str, Mapping[str, Multipliers]] = types.MappingProxyType({})
    blocks: Mapping[str, Mapping[str, Multipliers]] = types.MappingProxyType({})


class Parametrization(Tagged):
    """Root of the union: `--config.model.parametrization=mup`. steps: the kinds of steps it has rules for."""

    steps: ClassVar[frozenset[str]] = ALL

    def validate(self) -> None:
        bases = [field.name for field in dataclasses.fields(self) if field.name.startswith("base_")]
        check_least(self, "model.parametrization.", **dict.fromkeys(bases, 1))

    def at(self, width: int, layers: int, head_width: int) -> Scaling:
        """What it makes of a model of this shape."""
        raise NotImplementedError

    def check_model(self, model: Any) -> None:
        """Raises UserError for a `Transformer` that it has no rule for."""
        if model.positions.kind == "sinusoidal":
            raise UserError(
                f"model.parametrization={self.kind} has no rule for the sqrt(width) of sinusoidal positions; "
                "rotary, learned and none go with it"
            )
        for name, here in (
            ("experts", model.experts is not None),
            ("multiplier", model.multiplier != 1),
            ("attention.scale", model.attention.scale is not None),
        ):
            if here:
                raise UserError(f"model.parametrization={self.kind} has no rule for model.{name}")

    def check_optimizer(self, optimizer: Any) -> None:
        """Raises UserError for an optimizer that it has no rule for."""
        if not optimizer.steps <= self.steps:
            kinds = ", ".join(k for k, cls in optimizer.members.items() if cls.steps <= self.steps)
            raise UserError(
                f"model.parametrization={self.kind} has no rule for optimizer={optimizer.kind}; "
                f"it has one for {kinds}"
            )


@dataclasses.dataclass(frozen=True)
class Standard(Parametrization, kind="standard"):
    """One rate for all, hidden and output matrices with variance 1 / inputs, scores q.k / sqrt(K)."""

    def at(self, width: int, layers: int, head_width: int) -> Scaling:
        return Scaling(head_width**-0.5)

    def check_model(self, model: Any) -> None:
        """It takes every model."""


@dataclasses.dataclass(frozen=True)
class MuP(Parametrization, kind="mup"):
    """Maximal update: every activation moves by as much at every width (Yang et al. 2022, arXiv:2203.03466).

    Table 8 there, in which a tied table has one rule; hidden rates of Adam are divided by m. Epsilon as in
    arXiv:2505.01618, equation 40; Muon's matrices by the spectral condition (arXiv:2310.17813).
    base_head_width: K at which scores are those of the standard one.
    """

    steps: ClassVar[frozenset[str]] = ALL - {"adafactor"}

    base_width: int = 64
    base_head_width: int = 32

    def at(self, width: int, layers: int, head_width: int) -> Scaling:
        m = width / self.base_width
        leaves = {
            part: {
                "adam": _multipliers(m, rate=-(part == "hidden"), epsilon=-1),
                "sgd": _multipliers(m, rate=part != "hidden"),
                "muon": Multipliers(),
            }
            for part in Part.__args__
        }
        return Scaling(
            attention=head_width**-0.5 * (self.base_head_width / head_width) ** 0.5,
            output=1 / m,
            init={"embedding": m**0.5, "output": m**0.5},
            outer=leaves,
            blocks=leaves,
        )


@dataclasses.dataclass(frozen=True)
class CompleteP(MuP, kind="completep"):
    """muP that transfers over depth too (Dey et al. 2025, arXiv:2505.01618, table 1 and equation 40).

    alpha: 1 is CompleteP, 1/2 the rule of arXiv:2310.02244.
    """

    steps: ClassVar[frozenset[str]] = ALL - {"adafactor", "sgd"}

    base_layers: int = 2
    alpha: float = 1.0

    def validate(self) -> None:
        super().validate()
        if not 0.5 <= self.alpha <= 1:
            raise UserError(f"model.parametrization.alpha is {self.alpha}; it lies between 0.5 and 1")

    def at(self, width: int, layers: int, head_width: int) -> Scaling:
        wide, depth = super().at(width, layers, head_width), layers / self.base_layers

        def deeper(of: Multipliers) -> Multipliers:
            rate, epsilon = depth ** (self.alpha - 1), depth**-self.alpha
            return Multipliers(of.rate * rate, of.decay, of.epsilon * epsilon)

        blocks = {
            part: {steps: deeper(of) for steps, of in by_steps.items() if steps in self.steps}
            for part, by_steps in wide.blocks.items()
        }
        return wide._replace(residual=depth**-self.alpha, blocks=blocks)

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        if model.norm_position != "pre":
            raise UserError("model.parametrization=completep has a rule for model.norm_position=pre only")


@dataclasses.dataclass(frozen=True)
class PerLayer(Parametrization, kind="per_layer"):
    """The standard one with a rate for each kind of layer (Everett et al. 2024, arXiv:2407.05872).

    alignment: whether a matrix's updates and its inputs are taken to point the same way ("full": their
    product grows as the width) or at random ("none": as its root). Heads should be as wide at every width.
    """

    steps: ClassVar[frozenset[str]] = frozenset(("adam", "sgd"))

    base_width: int = 64
    alignment: Literal["full", "none"] = "full"

    def at(self, width: int, layers: int, head_width: int) -> Scaling:
        m, a = width / self.base_width, 1.0 if self.alignment == "full" else 0.5
        adam: Powers = {"embedding": 0, "hidden": -a, "output": -a, "vector": 0}
        sgd: Powers = {"embedding": 0.5, "hidden": 0.5 - a, "output": -a, "vector": 0.5}
        leaves = {
            part: {
                "adam": _multipliers(m, rate=adam[part], epsilon=0 if part == "output" else -0.5),
                "sgd": _multipliers(m, rate=sgd[part]),
            }
            for part in Part.__args__
        }
        return Scaling(head_width**-0.5, init={"embedding": m**0.5}, outer=leaves, blocks=leaves)

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        if model.tied:
            raise UserError(
                "model.parametrization=per_layer gives embedding and head a rate each: set model.tied=false"
            )


def _multipliers(m: float, rate: float, epsilon: float = 0.0) -> Multipliers:
    return Multipliers(m**rate, m**-rate, m**epsilon)
