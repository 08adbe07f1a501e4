"""Models: what every other room sees of one.

The shape key, used in every name of model code (`x_BTD`, `q_BTHK`):

    B batch   T time (queries)   S time (keys)   D model width   H heads   G key/value heads   K head size
    F feed-forward   V vocabulary   L layers   E experts   M members of a packed sweep

A model is a few pure functions on plain trees of arrays (`Model`), made by its config (`ModelConfig`) for one
way of executing it (`Layout`). The trainer sees nothing else, so a foreign model is one small file.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from llm_jax.config import Tagged, UserError, nearest
from llm_jax.files import in_bucket

Params = Any  # nested dict of float32 arrays; a leaf's name is its role's name
Batch = dict[str, jax.Array]


class Term(NamedTuple):
    """One named part of a loss, `weight * sum / count`; the mean is taken once, after all reductions."""

    sum: jax.Array
    count: jax.Array
    weight: jax.Array | float = 1.0


class Output(NamedTuple):
    """What `Model.apply` returns: hidden [B, T, D] (or [B, D]) and the loss terms the model itself brings."""

    hidden: jax.Array
    aux: dict[str, Term]


class Multipliers(NamedTuple):
    """What an optimizer's numbers are multiplied by for one parameter."""

    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0


@dataclasses.dataclass(frozen=True)
class Role:
    """What one parameter is, from which its sharding, its decay and its optimizer follow.

    axes: a logical axis (or None) for each dimension. decay: weight decay applies. matrix: (input dimensions,
    output dimensions) as Muon sees it, or None where Muon leaves it to AdamW (embeddings, head, norms,
    biases); a dimension in neither, such as "layers", is a stack. multipliers: by the optimizer's kind of
    steps (models/parametrization.py); empty means 1 for all.
    """

    name: str
    axes: tuple[str | None, ...]
    decay: bool
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    multipliers: Mapping[str, Multipliers] = dataclasses.field(default_factory=dict)

    def multiplier(self, steps: str) -> Multipliers:
        """For an optimizer that makes such steps; raises KeyError where the parametrisation has no rule."""
        return self.multipliers[steps] if self.multipliers else Multipliers()


def plain_roles(params: Params) -> Any:
    """A tree of roles for a model that names none: every leaf replicated, decay on matrices only."""

    def role(path: tuple, leaf: jax.Array) -> Role:
        return Role(str(getattr(path[-1], "key", path[-1])), (None,) * leaf.ndim, leaf.ndim >= 2)

    return jax.tree_util.tree_map_with_path(role, params)


@dataclasses.dataclass(frozen=True)
class Model:
    """A built model: pure functions of plain trees.

    init(key) -> params. apply(params, batch, key) -> Output; key drives dropout, None means evaluation.
    unembed(params, hidden [..., D]) -> float32 logits [..., V]; it also takes the subtree that
    unembed_params(params) returns, so that a chunked loss differentiates through nothing else.
    roles(params) -> tree of Role. A model that generates brings init_state(batch_size, length) -> state,
    decode(params, state, tokens, positions, lengths) -> (hidden, state) and state_axes(state), the tree of
    logical axes of its state. apart(params, keep=True) are the same parameters as they are read fastest where
    nothing trains, and without keep the others are used up; apply, decode and unembed take both.
    activations(params, batch, attention=False) -> {name: array [L, B, T, ...]} is for a look at what stands
    in every layer, and finish(params, x) -> hidden ends the model after any of them. frozen: the top-level
    names of parameters that are used and not trained; merge(params) -> the parameters of the same model
    without such, `ModelConfig.merged`.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, Batch, jax.Array | None], Output]
    unembed: Callable[[Params, jax.Array], jax.Array] | None = None
    roles: Callable[[Params], Any] = plain_roles
    unembed_params: Callable[[Params], Params] = lambda params: params
    init_state: Callable[[int, int], Any] | None = None
    decode: Callable[..., tuple[jax.Array, Any]] | None = None
    state_axes: Callable[[Any], Any] | None = None
    activations: Callable[..., dict[str, jax.Array]] | None = None
    finish: Callable[[Params, jax.Array], jax.Array] | None = None
    apart: Callable[..., Params] = lambda params, keep=True: params
    frozen: tuple[str, ...] = ()
    merge: Callable[[Params], Params] = lambda params: params

    def split(self, tree: Any) -> tuple[Any, Any]:
        """(frozen, trained): the two parts of a tree over the parameters."""
        if not self.frozen:
            return {}, tree
        trained = {name: part for name, part in tree.items() if name not in self.frozen}
        return {name: tree[name] for name in self.frozen}, trained


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is executed; the same mathematics, so no part of a run's identity.

    unroll: layers as straight code (True) or one scan (False); None unrolls on the CPU, where a scan is
    slower. remat: what the backward pass computes again instead of keeping: nothing, every block, or all but
    its matrix products. attention: which implementation attends; auto picks by device.
    """

    unroll: bool | None = None
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "reference", "chunked", "cudnn", "splash", "ring"] = "auto"


DEFAULT_LAYOUT = Layout()


class ModelConfig(Tagged):
    """Root of the union of models: `--config.model.kind=transformer`, `--config.model=gpt2-124m`."""

    @classmethod
    def parse(cls, text: str) -> "ModelConfig":
        """A preset of `models/presets.py`, the member `text` with its defaults, or the model at a place."""
        from llm_jax.models.presets import PRESETS

        if text not in PRESETS and text not in cls.members:
            is_place = in_bucket(text) or os.path.exists(os.path.expanduser(text))
            if "pretrained" in cls.members and is_place:
                return cls.members["pretrained"](path=text)
            raise UserError(f"no model {text!r}; {nearest(text, cls.choices())}")
        return PRESETS[text] if text in PRESETS else super().parse(text)

    @classmethod
    def choices(cls) -> list[str]:
        from llm_jax.models.presets import PRESETS

        return [*cls.members, *PRESETS, "a run's folder, a Hugging Face directory or a .gguf file"]

    def resolve(self, data: Any) -> "ModelConfig":
        """The same model with what only the data knows filled in (`data.vocabulary`: number of token ids)."""
        return self

    @property
    def merged(self) -> "ModelConfig":
        """The model that is left when training is over: this one, unless parts were trained beside it."""
        return self

    def beginning(self, data: Any, codec: Any) -> Callable[[Any], Params] | None:
        """What reads the parameters, or some of them, that training begins with: mesh -> params.

        None: all are drawn. codec: what made the data's tokens, if any did. Raises UserError where the
        parameters don't fit the data.
        """
        return None

    def record(self, data: Any) -> Mapping[str, Any]:
        """JSON facts for the run's record: where parameters come from."""
        return {}

    def build(self, layout: Layout = DEFAULT_LAYOUT) -> Model:
        """The functions of this model, executed as `layout` says."""
        raise NotImplementedError
