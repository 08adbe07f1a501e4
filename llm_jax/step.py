"""The train step, `step(state, batch, hyper) -> (state, metrics)`: pure, and the only one there is.

Packed sweeps, trunks and branches, fine-tuning and foreign models all go through it. What varies between them
is data: arrays in `hyper`, functions in the `Model`, terms from the `Objective`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax import optimizers, sharding
from llm_jax.losses import Objective, total
from llm_jax.models import Batch, Model, Params, Term

Hyper = dict[str, jax.Array]
Step = Callable[["State", Batch, Hyper], tuple["State", dict[str, jax.Array]]]


class State(NamedTuple):
    """All that a run is at a step. `frozen` holds parameters that are used but not trained."""

    trained: Params
    frozen: Params
    optimizer: Any
    step: jax.Array
    key: jax.Array


def make_step(
    model: Model, objective: Objective, optimizer: optimizers.Optimizer, roles: Any, micro_batches: int = 1
) -> Step:
    """One update of the parameters on one global batch.

    hyper: one row of `optimizers.tables`, scalars. metrics: scalars; `loss` and every term's mean, norms of
    gradient and update as a whole and by role.
    """

    roles = model.split(roles)[1]

    def step(state: State, batch: Batch, hyper: Hyper) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        weights = {n.removeprefix("weights/"): v for n, v in hyper.items() if n.startswith("weights/")}

        def terms_of(trained: Params, micro_batch: Batch, micro_key: jax.Array) -> dict[str, Term]:
            params = state.frozen | trained
            return objective.terms(model, params, micro_batch, micro_key, weights)

        gradient, terms = accumulate(terms_of, state.trained, batch, key, micro_batches)
        updates, optimizer_state = optimizers.update(
            optimizer, roles, gradient, state.optimizer, state.trained, hyper
        )
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": total(terms), "learning_rate": hyper["learning_rate"]}
        metrics |= {f"loss/{name}": term.sum / term.count for name, term in terms.items()}
        metrics |= norms("gradient_norm", roles, gradient) | norms("update_norm", roles, updates)
        return State(trained, state.frozen, optimizer_state, state.step + 1, state.key), metrics

    return step


def accumulate(
    terms_of: Callable[[Params, Batch, jax.Array], dict[str, Term]],
    trained: Params,
    batch: Batch,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Params, dict[str, Term]]:
    """The gradient of `total(terms)` over the whole batch, a micro-batch at a time.

    Counts are those of the whole batch, so uneven masks don't weigh micro-batches unevenly. They are summed
    in a pass of their own, in which the compiler drops all else.
    """

    def loss(trained: Params, micro_batch: Batch, micro_key: jax.Array, counts: Any) -> tuple[jax.Array, Any]:
        terms = terms_of(trained, micro_batch, micro_key)
        return total(terms, counts), terms

    if micro_batches == 1:
        gradient, terms = jax.grad(loss, has_aux=True)(trained, batch, key, None)
        return gradient, terms

    # Row r goes to micro-batch r mod n, so that every device has rows of each.
    split = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, micro_batches)

    def sum_over_micro_batches(f: Callable[[Batch, jax.Array], Any]) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, jax.tree.map(lambda x: x[0], split), keys[0]))
        add = lambda sums, item: (jax.tree.map(jnp.add, sums, f(*item)), None)  # noqa: E731
        return jax.lax.scan(add, zeros, (split, keys))[0]

    counts = sum_over_micro_batches(
        lambda micro, k: {name: term.count for name, term in terms_of(trained, micro, k).items()}
    )

    def gradient_and_sums(micro_batch: Batch, micro_key: jax.Array) -> Any:
        gradient, terms = jax.grad(loss, has_aux=True)(trained, micro_batch, micro_key, counts)
        return gradient, {name: (term.sum, term.weight / micro_batches) for name, term in terms.items()}

    gradient, sums = sum_over_micro_batches(gradient_and_sums)
    return gradient, {name: Term(s, counts[name], weight) for name, (s, weight) in sums.items()}


def norms(label: str, roles: Any, tree: Params) -> dict[str, jax.Array]:
    """The norm of `tree` as a whole, `label`, and of the leaves of each role, `label/role`."""
    by_role = optimizers.norms_by_role(roles, tree)
    whole = jnp.sqrt(sum(jnp.square(norm) for norm in by_role.values()))
    return {label: whole} | {f"{label}/{name}": norm for name, norm in by_role.items()}


# ---- many at once ----


def over_members(step: Step, own_rows: bool) -> Step:
    """The step of a pack: state, hyper and metrics have a leading member axis, with own rows the batch too.

    hyper["active"] is 0 for members that are done: their state stays what it is, bit for bit.
    """
    packed = jax.vmap(step, in_axes=(0, 0 if own_rows else None, 0), spmd_axis_name="member")

    def masked(state: State, batch: Batch, hyper: Hyper) -> tuple[State, dict[str, jax.Array]]:
        new, metrics = packed(state, batch, hyper)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            active = hyper["active"].reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(active > 0, new, old)

        return jax.tree.map(keep, new, state), metrics

    return masked


def over_block(step: Step) -> Step:
    """Several steps as one: batch, hyper and metrics have a leading axis of steps.

    The block ends before the first step in which nothing is active. So one program takes any number of steps
    up to its size, and they compute the same however they are cut into blocks.
    """

    def block(state: State, batch: Batch, hyper: Hyper) -> tuple[State, dict[str, jax.Array]]:
        def at(k: int | jax.Array) -> tuple[Batch, Hyper]:
            return jax.tree.map(lambda x: x[k], (batch, hyper))

        def one(k: jax.Array, carry: Any) -> Any:
            state, rows = carry
            state, row = step(state, *at(k))
            return state, jax.tree.map(lambda all_, x: all_.at[k].set(x), rows, row)

        active = hyper["active"].reshape(len(hyper["active"]), -1).max(axis=1)
        empty = jax.tree.map(
            lambda x: jnp.zeros((len(active), *x.shape), x.dtype), jax.eval_shape(step, state, *at(0))[1]
        )
        return jax.lax.fori_loop(0, (active > 0).sum(), one, (state, empty))

    return block


# ---- where the state lies ----


def make_init(model: Model, optimizer: optimizers.Optimizer, roles: Any) -> Callable[..., State]:
    """The state at step 0 by (key, scale): the key's first half makes the parameters, the rest is kept.

    scale: what all that decays (matrices) is multiplied by. read: parameters, by their top-level names, that
    take the place of drawn ones.
    """

    def init(key: jax.Array, scale: jax.Array | float = 1.0, read: Params | None = None) -> State:
        init_key, run_key = jax.random.split(key)
        params = jax.tree.map(lambda role, x: x * scale if role.decay else x, roles, model.init(init_key))
        if read is not None:
            params |= jax.tree.map(lambda x: x.astype(jnp.float32), read)
        frozen, trained = model.split(params)
        kept = optimizers.init(optimizer, model.split(roles)[1], trained)
        return State(trained, frozen, kept, jnp.int32(0), run_key)

    return init


def state_shardings(state: State, roles: Any, mesh: jax.sharding.Mesh) -> State:
    """Parameters, frozen ones too, by their roles; an optimizer's leaf as the parameter its path ends with.

    roles: of all parameters, `state.frozen | state.trained`.
    """
    params = state.frozen | state.trained
    placed = sharding.shardings(params, jax.tree.map(lambda role: role.axes, roles), mesh)
    by_path = {
        path: (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(placed), strict=True
        )
    }
    whole = sharding.whole(mesh)

    def like_parameter(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        for start in range(len(path)):
            shape, place = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return place
        return whole

    return jax.tree_util.tree_map_with_path(like_parameter, state)
