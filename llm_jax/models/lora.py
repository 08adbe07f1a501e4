"""Low-rank adaptation: a model stays as it is, and beside its matrices products of two thin ones are learned.

    y = x W + (alpha / rank) x A B      A [inputs, rank], B [rank, outputs]; Hu et al. 2021, arXiv:2106.09685

B starts at zero, so that training starts at the model itself, to the bit. Only A and B are trained.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import UserError, nearest
from llm_jax.models import DEFAULT_LAYOUT, Layout, Model, ModelConfig, Params, Role
from llm_jax.models.adapted import Adapted
from llm_jax.models.roles import TABLE, rule
from llm_jax.models.transformer import Transformer
from llm_jax.values import check_least

# The matrices of a block that every token meets.
MATRICES = tuple(name for name, row in TABLE.items() if row.part == "hidden" and "experts" not in row.axes)
PART = "lora"  # of the parameters


@dataclasses.dataclass(frozen=True)
class LoRA(ModelConfig, kind="lora"):
    """`base` with thin matrices beside those in `matrices`, in every block.

    rank: of their product. alpha: what it is multiplied by, over rank, so that a rate suits every rank.
    Beside all of a block's matrices it learns more than beside attention's (Biderman et al. 2024,
    arXiv:2405.09673). whole: parts of the parameters that are trained themselves, such as embed.
    """

    base: ModelConfig = Transformer()
    rank: int = 8
    alpha: float = 16.0
    matrices: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    whole: tuple[str, ...] = ()

    def validate(self) -> None:
        check_least(self, "model.", positive=("alpha",), rank=1)
        if isinstance(self.base, LoRA):
            raise UserError("model.base is a lora; a model has one: open the run instead, which merges it")
        for name in self.matrices or ("",):
            if name not in MATRICES:
                raise UserError(f"model.matrices: no matrix {name!r}; {nearest(name, MATRICES)}")

    @property
    def merged(self) -> ModelConfig:
        return self.base

    @property
    def vocabulary(self) -> int | None:
        return self.base.vocabulary

    def resolve(self, data: Any) -> "LoRA":
        return dataclasses.replace(self, base=self.base.resolve(data))

    def beginning(self, data: Any, codec: Any) -> Callable[[Any], Params] | None:
        if new := self.base.record(data).get("new_tokens", 0):
            parts = _names(self.base.resolve(data).build())
            rows = [name for name in ("embed", "head") if name in parts]  # no head where it is tied
            if not {*rows} <= {*self.whole}:
                raise UserError(
                    f"{new} special tokens of data.template are new to the model, and lora leaves their rows "
                    f"as they are: --config.model.whole={','.join(rows)}, trains them"
                )
        return self.base.beginning(data, codec)

    def record(self, data: Any) -> Mapping[str, Any]:
        return self.base.record(data)

    def build(self, layout: Layout = DEFAULT_LAYOUT) -> Model:
        """The base's functions, each of which reads base and thin matrices together."""
        base, scale = self.base.build(layout), self.alpha / self.rank
        names = _names(base)
        if unknown := [name for name in self.whole if name not in names]:
            raise UserError(f"model.whole: no part {unknown[0]!r} there; {nearest(unknown[0], names)}")

        def init(key: jax.Array) -> Params:
            params = base.init(key)
            return params | {PART: self._draw(jax.random.fold_in(key, 1), params)}

        def together(params: Params) -> Params:
            return _join(params, lambda _, matrix, thin, wide: Adapted(matrix, thin, scale * wide))

        def merge(params: Params) -> Params:
            return _join(params, functools.partial(_added, scale))

        def roles(params: Params) -> Any:
            whole = base.roles({name: params[name] for name in names})
            return whole | {PART: _roles(params[PART], whole)}

        def seen(function: Callable | None) -> Callable | None:
            return function and (lambda params, *rest, **more: function(together(params), *rest, **more))

        return dataclasses.replace(
            base,
            init=init,
            apply=seen(base.apply),
            roles=roles,
            decode=seen(base.decode),
            activations=seen(base.activations),
            frozen=tuple(name for name in names if name not in self.whole),
            apart=lambda params, keep=True: base.apart(merge(params), keep),
            merge=merge,
        )

    def _draw(self, key: jax.Array, params: Params) -> Params:
        """A with variance 1 / inputs, so that x A has the scale of x; B zero."""
        drawn: Params = {}
        for number, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
            if (name := path[-1].key) not in self.matrices:
                continue
            stack, inputs, outputs = _sides(name, leaf)
            thin = jax.random.normal(jax.random.fold_in(key, number), (*stack, *inputs, self.rank))
            inside = drawn
            for part in path:
                inside = inside.setdefault(part.key, {})
            inside |= {
                "thin": thin * math.prod(inputs) ** -0.5,
                "wide": jnp.zeros((*stack, self.rank, *outputs)),
            }
        if not drawn:
            raise UserError(f"model.matrices: {self.base.kind} has none of {', '.join(self.matrices)}")
        return drawn


def _names(model: Model) -> tuple[str, ...]:
    """The parts of a model's parameters."""
    return tuple(jax.eval_shape(model.init, jax.random.key(0)))


def _sides(name: str, leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The sizes of a matrix's dimensions: those of its stack, its inputs and its outputs."""
    row = rule(name)
    stack = leaf.ndim - len(row.axes)
    inputs = stack + row.inputs
    return leaf.shape[:stack], leaf.shape[stack:inputs], leaf.shape[inputs:]


def _join(params: Params, join: Callable[..., Any]) -> Params:
    """The base's tree, with join(name, matrix, thin, wide) in the place of each matrix that has thin ones."""

    def over(name: str, part: Any, learned: Any) -> Any:
        if not isinstance(part, Mapping):
            return join(name, part, **learned)
        return {key: over(key, x, learned[key]) if key in learned else x for key, x in part.items()}

    base = {name: part for name, part in params.items() if name != PART}
    return over("", base, params.get(PART, {}))


def _added(scale: float, name: str, matrix: jax.Array, thin: jax.Array, wide: jax.Array) -> jax.Array:
    """W + scale A B, layer by layer."""
    stack, rank = _sides(name, matrix)[0], thin.shape[-1]
    factors = thin.reshape(*stack, -1, rank), wide.reshape(*stack, rank, -1)
    return matrix + scale * jnp.matmul(*factors, precision="highest").reshape(matrix.shape)


def _roles(learned: Params, whole: Any) -> Any:
    """Roles of thin and wide, by those of the matrices beside which they stand."""

    def role(path: tuple, leaf: jax.Array) -> Role:
        *place, side = (part.key for part in path)
        of = functools.reduce(lambda tree, name: tree[name], place, whole)
        stack = len(of.axes) - len(rule(of.name).axes)
        cut = stack + rule(of.name).inputs
        if side == "thin":
            axes, first = (*of.axes[:cut], None), cut
        else:
            axes, first = (*of.axes[:stack], None, *of.axes[cut:]), stack + 1
        matrix = tuple(range(stack, first)), tuple(range(first, leaf.ndim))
        return Role(f"{of.name}_{side}", axes, True, matrix)

    return jax.tree_util.tree_map_with_path(role, learned)
