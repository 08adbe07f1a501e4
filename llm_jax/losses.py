"""Objectives: named loss terms (sum, count, weight), and a next-token loss that never holds all its logits.

A mean is taken once, after all reductions (`total`): with counts over the whole global batch, gradients of
micro-batches add up to the gradient of the big batch however unevenly their masks are filled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import Tagged, UserError
from llm_jax.kernels import devices
from llm_jax.models import Batch, Model, Params, Term

# Logits of one time slice, per device: what stays in a CPU's cache; elsewhere, what keeps matrix units busy.
SLICE_BYTES = {"cpu": 2**21, "other": 2**28}


class Objective(Tagged):
    """What is minimised: a union of configs, each a few named terms."""

    def terms(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        weights: Mapping[str, jax.Array],
    ) -> dict[str, Term]:
        """The loss terms of one batch; `weights` holds this step's value of each weight in `weights()`."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """Weights that may change from step to step; they become columns `weights/<term>` of the tables."""
        return {}

    def structure(self) -> "Objective":
        """What of it decides the compiled program: weights are arrays there."""
        return dataclasses.replace(self, **{name: 0.0 for name in self.weights() if hasattr(self, name)})


def total(terms: Mapping[str, Term], counts: Mapping[str, jax.Array] | None = None) -> jax.Array:
    """The loss: sum over terms of weight * sum / count (a term that counts nothing adds nothing).

    counts: by term, over the whole global batch, where `terms` are those of one micro-batch of it.
    """
    loss = jnp.zeros(())
    for name, term in terms.items():
        count = term.count if counts is None else counts[name]
        loss += term.weight * term.sum / jnp.where(count == 0, 1, count)
    return loss


@dataclasses.dataclass(frozen=True)
class NextToken(Objective, kind="next_token"):
    """Cross entropy of the next token in nats, and z_loss times the squared log normaliser (PaLM, section 5).

    Reads batch["targets"] and batch["mask"], both [B, T].
    """

    z_loss: float = 0.0

    def validate(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"objective.z_loss is {self.z_loss}; a weight is 0 (off) or positive")

    def weights(self) -> dict[str, float]:
        return {"next_token": 1.0, "z_loss": self.z_loss}

    def terms(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        weights: Mapping[str, jax.Array],
    ) -> dict[str, Term]:
        hidden_BTD, aux = model.apply(params, batch, key)
        head, targets_BT, mask_BT = _head(model, params), batch["targets"], batch["mask"]
        names = ("next_token", "z_loss")
        direction = jnp.stack([jnp.asarray(weights[name], jnp.float32) for name in names])
        length = _slice_length(model.unembed, head, hidden_BTD)
        sums = _sums(model.unembed, length, head, hidden_BTD, targets_BT, mask_BT, direction)
        count = mask_BT.sum()
        return {name: Term(sums[i], count, weights[name]) for i, name in enumerate(names)} | aux


def token_losses(model: Model, params: Params, batch: Batch) -> jax.Array:
    """Nats of each target [B, T], 0 where batch["mask"] is 0; no dropout, and never all logits at once."""
    hidden_BTD, _ = model.apply(params, batch, None)
    head = _head(model, params)
    length = _slice_length(model.unembed, head, hidden_BTD)

    def one(_: None, part: tuple) -> tuple[None, jax.Array]:
        hidden, targets = part
        nats, _ = _nats(model.unembed, head, hidden, targets)
        return None, nats.reshape(targets.shape)

    _, nats = jax.lax.scan(one, None, _slices(length, hidden_BTD, batch["targets"]))
    return _join(nats, hidden_BTD) * batch["mask"]


# ---- the sliced cross entropy ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    unembed: Callable,
    length: int,
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    direction: jax.Array,
) -> jax.Array:
    """[sum of nats, sum of squared log normalisers] over the masked tokens, time slice by time slice.

    To be differentiated only along `direction`, the weights of the two sums in the loss: then the forward
    pass can take each slice's gradient while its logits exist, and nothing is computed twice.
    """

    def one(sums: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        return sums + _slice_sums(unembed, head, *part), None

    return jax.lax.scan(one, jnp.zeros(2), _slices(length, hidden, targets, mask))[0]


def _sums_forward(
    unembed: Callable,
    length: int,
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    direction: jax.Array,
) -> tuple[jax.Array, tuple]:
    def weighted(head: Params, hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple:
        sums = _slice_sums(unembed, head, hidden, targets, mask)
        return sums @ direction, sums

    gradient = jax.value_and_grad(weighted, (0, 1), has_aux=True)

    def one(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        (_, sums), (of_head, of_hidden) = _by_group(gradient, head, *part)
        return jax.tree.map(jnp.add, carry, (sums, of_head)), of_hidden

    parts = _slices(length, hidden, targets, mask)
    # Each group of rows adds up on its own devices; over the mesh they are added once, after the loop.
    start = jax.tree.map(lambda x: jnp.zeros((parts[0].shape[1], *x.shape), x.dtype), (direction, head))
    by_group, of_hidden = jax.lax.scan(one, start, parts)
    sums, of_head = jax.tree.map(lambda x: x.sum(0), by_group)
    return sums, (of_head, _join(of_hidden, hidden), direction)


def _sums_backward(unembed: Callable, length: int, kept: tuple, cotangent: jax.Array) -> tuple:
    head_gradient, hidden_gradient, direction = kept
    size = direction @ direction
    scale = cotangent @ direction / jnp.where(size == 0, 1, size)
    # Another direction than the one asked for would get a wrong gradient: make it none at all.
    apart = jnp.abs(cotangent - scale * direction).max() > 1e-4 * jnp.abs(cotangent).max()
    scale = jnp.where(apart, jnp.nan, scale)
    scaled = jax.tree.map(lambda g: (scale * g).astype(g.dtype), (head_gradient, hidden_gradient))
    return (*scaled, None, None, None)


_sums.defvjp(_sums_forward, _sums_backward)


def _slice_sums(
    unembed: Callable, head: Params, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    nats, log_normaliser = _nats(unembed, head, hidden, targets)
    weight = mask.reshape(-1)
    return jnp.stack([(nats * weight).sum(), (log_normaliser**2 * weight).sum()])


def _nats(
    unembed: Callable, head: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cross entropy, log normaliser) of each token of a slice, flat: a matrix of logits is twice as fast."""
    logits = unembed(head, hidden.reshape(-1, hidden.shape[-1])).astype(jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
    return log_normaliser - chosen, log_normaliser


def _slice_length(unembed: Callable, head: Params, hidden: jax.Array) -> int:
    """Time steps whose logits fit SLICE_BYTES on each device; at most half, so that no [B, T, V] exists."""
    batch, time, _ = hidden.shape
    vocabulary = jax.eval_shape(unembed, head, hidden[:, :1]).shape[-1]
    mesh, groups = jax.sharding.get_abstract_mesh(), _groups(batch, time)
    ways = groups[0] * sharding.ways("vocabulary", mesh)
    time //= groups[1]
    backend = devices.platform()
    room = SLICE_BYTES.get(backend, SLICE_BYTES["other"]) * ways // (4 * batch * vocabulary)
    slices = -(-time // min(max(1, room), max(1, time // 2)))
    return -(-time // slices)


def _groups(batch: int, time: int) -> tuple[int, int]:
    """Over how many devices rows and tokens of a row are spread, where that divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, tokens = (sharding.ways(axis, mesh) for axis in ("batch", "time"))
    return (rows, tokens) if batch % rows == 0 and time % tokens == 0 else (1, 1)


def _slices(length: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] as [slices, groups, B / groups, length, ...], the last slice filled with zeros.

    A group is what lies together on the mesh: some rows, or a part of the time of some.
    """
    rows, time = arrays[0].shape[:2]
    over, parts = _groups(rows, time)

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = x.reshape(over, rows // over, parts, time // parts, *rest)
        missing = -x.shape[3] % length
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, missing),) + ((0, 0),) * len(rest)) if missing else x
        x = jnp.moveaxis(x.reshape(*x.shape[:3], -1, length, *rest), (3, 2), (0, 2))
        x = x.reshape(x.shape[0], over * parts, *x.shape[3:])
        return x if over * parts == 1 else sharding.constrain(x, None, "tokens", *[None] * (x.ndim - 2))

    return tuple(cut(x) for x in arrays)


def _by_group(function: Callable, head: Params, *part: jax.Array) -> Any:
    """function(head, ...) for each group; a lone one without vmap, whose products are slower on CPU."""
    if part[0].shape[0] > 1:
        return jax.vmap(functools.partial(function, head))(*part)
    return jax.tree.map(lambda x: x[None], function(head, *(x[0] for x in part)))


def _join(parts: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_slices`: [slices, groups, B / groups, length, ...] as [B, T, ...]."""
    batch, time = like.shape[:2]
    over, cuts = _groups(batch, time)
    slices, _, rows, length, *rest = parts.shape
    x = jnp.moveaxis(parts.reshape(slices, over, cuts, rows, length, *rest), (0, 2), (3, 2))
    x = x.reshape(over, rows, cuts, slices * length, *rest)[:, :, :, : time // cuts]
    return x.reshape(batch, time, *rest)


def _head(model: Model, params: Params) -> Params:
    if model.unembed is None:
        raise UserError("objective next_token needs a model that predicts tokens; this one has no unembed")
    return model.unembed_params(params)
