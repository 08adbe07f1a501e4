"""What each parameter is: one table from a leaf's name to its initialisation, sharding, decay and optimizer.

A leaf's name in the parameter tree is its role, so "query" means the same in every family, and a leaf that
the table does not know is an error, not a default. Dimensions are counted without the "layers" axis on which
the blocks of a decoder are stacked; `roles` puts it in front.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models import Params, Role
from llm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: logical axes, initialisation, and the number of leading dimensions that a matrix sums over.

    init: a constant; "fan_in", normal with variance 1 / summed dimensions, so that outputs have the scale of
    the inputs at every width; "branch", that divided by the 2 x layers branches that add up in the residual
    stream (GPT-2); "table", normal with deviation 0.02 (GPT-2).
    """

    axes: tuple[str | None, ...]
    init: Literal["zeros", "ones", "fan_in", "branch", "table"]
    inputs: int = 0
    decay: bool = False
    muon: bool = False


def _matrix(*axes: str | None, inputs: int = 1, init: Literal["fan_in", "branch"] = "fan_in") -> Rule:
    return Rule(axes, init, inputs, decay=True, muon=True)


TABLE: dict[str, Rule] = {
    "embedding": Rule(("vocabulary", "embed"), "table", decay=True),
    "position": Rule((None, "embed"), "table", decay=True),
    "head": Rule(("embed", "vocabulary"), "fan_in", inputs=1, decay=True),
    "query": _matrix("embed", "heads", "head_dim"),
    "key": _matrix("embed", "kv_heads", "head_dim"),
    "value": _matrix("embed", "kv_heads", "head_dim"),
    "out": _matrix("heads", "head_dim", "embed", inputs=2, init="branch"),
    "gate": _matrix("embed", "mlp"),
    "up": _matrix("embed", "mlp"),
    "down": _matrix("mlp", "embed", init="branch"),
    "query_bias": Rule(("heads", "head_dim"), "zeros"),
    "key_bias": Rule(("kv_heads", "head_dim"), "zeros"),
    "value_bias": Rule(("kv_heads", "head_dim"), "zeros"),
    "out_bias": Rule(("embed",), "zeros"),
    "gate_bias": Rule(("mlp",), "zeros"),
    "up_bias": Rule(("mlp",), "zeros"),
    "down_bias": Rule(("embed",), "zeros"),
    "scale": Rule(("embed",), "ones"),
    "shift": Rule(("embed",), "zeros"),
    "query_scale": Rule(("head_dim",), "ones"),
    "key_scale": Rule(("head_dim",), "ones"),
}


def rule(name: str) -> Rule:
    """The row of a leaf; raises KeyError for a name that the table does not know."""
    if name not in TABLE:
        raise KeyError(f"parameter {name!r} has no row in models/roles.py; there are: {', '.join(TABLE)}")
    return TABLE[name]


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Declares a float32 parameter of `module`; what it starts as is the table's to say (`draw`)."""
    if len(shape) != len(rule(name).axes):
        raise ValueError(f"parameter {name!r} of shape {shape}: its role has the axes {rule(name).axes}")
    return module.param(name, nn.initializers.zeros, shape)


def draw(key: jax.Array, shapes: Params, layers: int) -> Params:
    """Fresh parameters of these shapes, for a model of so many layers.

    One stream of normal numbers is cut into the leaves: XLA compiles every call of a generator for itself, up
    to two seconds each on a CPU where sizes aren't powers of two.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    rows = [rule(path[-1].key) for path, _ in flat]
    random = [
        leaf.size for (_, leaf), row in zip(flat, rows, strict=True) if row.init not in ("zeros", "ones")
    ]
    # Whole on every device: cutting a spread stream would move it about.
    stream, start, leaves = constrain(jax.random.normal(key, (sum(random),)), None), 0, []
    for (_, leaf), row in zip(flat, rows, strict=True):
        if row.init in ("zeros", "ones"):
            leaves.append(jnp.full(leaf.shape, float(row.init == "ones")))
            continue
        deviation = 0.02 if row.init == "table" else math.prod(leaf.shape[: row.inputs]) ** -0.5
        deviation *= (2 * layers) ** -0.5 if row.init == "branch" else 1
        leaves.append(deviation * stream[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(tree, leaves)


def roles(params: Params) -> Any:
    """The tree of `Role`s of a tree of parameters (or their shapes); raises KeyError for a strange leaf."""

    def role(path: tuple, leaf: Any) -> Role:
        name = path[-1].key
        row = rule(name)
        stack = leaf.ndim - len(row.axes)
        if stack not in (0, 1):
            raise ValueError(f"parameter {name!r} of shape {leaf.shape}: its role has the axes {row.axes}")
        dims = tuple(range(stack, leaf.ndim))
        matrix = (dims[: row.inputs], dims[row.inputs :]) if row.muon else None
        return Role(name, ("layers",) * stack + row.axes, row.decay, matrix)

    return jax.tree_util.tree_map_with_path(role, params)
