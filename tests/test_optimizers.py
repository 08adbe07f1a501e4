"""Optimizers against torch, optax and transcriptions of the papers, and what all of them promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import config, experiment_file, links, optimizers
from llm_jax.config import UserError
from llm_jax.losses import NextToken
from llm_jax.models import Multipliers, Role
from llm_jax.optimizers import (
    SGD,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    Optimizer,
    ScheduleFree,
    evaluation_params,
    norms_by_role,
    tables,
)
from llm_jax.schedules import Constant, Cosine

STEPS = 20
STEADY = Constant(warmup_fraction=0.0)
OFF = float("inf")
SHAPES = {"query": (2, 12, 3, 4), "up": (2, 12, 24), "down": (24, 12), "embedding": (30, 12), "scale": (12,)}
ROLES = {
    "query": Role("query", ("layers", "embed", "heads", "head_dim"), True, ((1,), (2, 3))),
    "up": Role("up", ("layers", "embed", "mlp"), True, ((1,), (2,))),
    "down": Role("down", ("mlp", "embed"), True, ((0,), (1,))),
    "embedding": Role("embedding", ("vocabulary", "embed"), True),
    "scale": Role("scale", ("embed",), False),
}
MEMBERS = [pytest.param(cls, id=kind) for kind, cls in Optimizer.members.items()]


def normal(seed: int, scale: float = 1.0, shapes=SHAPES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: (scale * random.standard_normal(s)).astype(np.float32) for name, s in shapes.items()}


GRADIENTS = [normal(step, 0.1 * (1 + step % 3)) for step in range(STEPS)]


def trajectory(optimizer, params=None, gradients=GRADIENTS, roles=ROLES):
    """(parameters, state) after each step, a gradient a step."""
    params = params or normal(99)
    table = tables(optimizer, NextToken(), len(gradients))
    state = optimizers.init(optimizer, roles, params)

    @jax.jit
    def step(params, state, gradient, hyper):
        updates, state = optimizers.update(optimizer, roles, gradient, state, params, hyper)
        return optax.apply_updates(params, updates), state

    for index, gradient in enumerate(gradients):
        params, state = step(params, state, gradient, {name: column[index] for name, column in table.items()})
        yield params, state


def run(optimizer, params=None, gradients=GRADIENTS, roles=ROLES):
    """(parameters, state) after all steps."""
    return list(trajectory(optimizer, params, gradients, roles))[-1]


def run_optax(transform):
    params = normal(99)
    state = transform.init(params)
    step = jax.jit(transform.update)
    for gradient in GRADIENTS:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(actual, expected, tolerance=1e-6):
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


# ---- a role's multipliers ----


@pytest.mark.parametrize("cls", MEMBERS)
@pytest.mark.parametrize("name", ["up", "embedding"])
def test_a_role_s_multipliers_are_its_own_rate_decay_and_epsilon(cls, name):
    optimizer = cls(clip_norm=OFF, weight_decay=0.2, schedule=STEADY)
    given = Multipliers(rate=3.0, decay=0.5, epsilon=1e5)
    roles = ROLES | {name: dataclasses.replace(ROLES[name], multipliers=dict.fromkeys(cls.steps, given))}
    names = [field.name for field in dataclasses.fields(cls)]
    changed = {f: getattr(optimizer, f) * 3.0 for f in names if f.endswith("learning_rate")}
    changed |= {"epsilon": optimizer.epsilon * 1e5} if "epsilon" in names else {}
    other = dataclasses.replace(optimizer, weight_decay=0.1, **changed)
    multiplied, _ = run(optimizer, gradients=GRADIENTS[:5], roles=roles)
    plain, _ = run(optimizer, gradients=GRADIENTS[:5])
    expected, _ = run(other, gradients=GRADIENTS[:5])
    assert_close(multiplied, plain | {name: expected[name]}, 2e-6)
    assert np.abs(multiplied[name] - plain[name]).max() > 1e-3


# ---- against what others wrote ----


def run_torch(make, schedule, learning_rate, clip_norm=None):
    """The parameters after the same gradients under a torch optimizer, decay on matrices only."""
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in normal(99).items()}
    decayed = [p for name, p in params.items() if ROLES[name].decay]
    kept = [p for name, p in params.items() if not ROLES[name].decay]
    optimizer = make(torch, [{"params": decayed}, {"params": kept, "weight_decay": 0.0}])
    for gradient, factor in zip(GRADIENTS, schedule.table(STEPS), strict=True):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def test_adamw_equals_torch_s_with_schedule_and_clipping():
    schedule = Cosine(0.2, 0.1)
    actual, _ = run(AdamW(1e-2, 0.3, 2.0, schedule, beta1=0.8, beta2=0.97, epsilon=1e-6))
    expected = run_torch(
        lambda torch, groups: torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3),
        schedule,
        1e-2,
        clip_norm=2.0,
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_s_whose_decay_is_part_of_the_gradient(nesterov):
    actual, _ = run(SGD(0.05, 0.1, OFF, STEADY, momentum=0.8, nesterov=nesterov))
    expected = run_torch(
        lambda torch, groups: torch.optim.SGD(
            groups, 0.05, momentum=0.8, weight_decay=0.1, nesterov=nesterov
        ),
        STEADY,
        0.05,
    )
    assert_close(actual, expected)


def test_lion_equals_optax_s():
    mask = {name: role.decay for name, role in ROLES.items()}
    expected, _ = run_optax(optax.lion(1e-2, 0.9, 0.95, weight_decay=0.2, mask=mask))
    assert_close(run(Lion(1e-2, 0.2, OFF, STEADY, beta1=0.9, beta2=0.95))[0], expected)


def test_adafactor_equals_optax_s_for_each_layer():
    flat = {f"{name}.{i}": p for name in ("query", "up") for i, p in enumerate(normal(99)[name])}
    flat |= {name: normal(99)[name] for name in ("down", "embedding", "scale")}
    # optax adds its decay without the rate.
    transform = optax.adafactor(
        0.05,
        min_dim_size_to_factor=4,
        weight_decay_rate=0.05 * 0.2,
        weight_decay_mask={name: name != "scale" for name in flat},
    )
    state = transform.init(flat)
    step = jax.jit(transform.update)
    for gradient in GRADIENTS:
        layers = {f"{name}.{i}": gradient[name][i] for name in ("query", "up") for i in range(2)}
        updates, state = step({name: layers.get(name, gradient.get(name)) for name in flat}, state, flat)
        flat = optax.apply_updates(flat, updates)
    actual, _ = run(Adafactor(0.05, 0.2, OFF, STEADY, factored_from=4))
    for name, expected in flat.items():
        leaf, _, layer = name.partition(".")
        value = actual[leaf][int(layer)] if layer else actual[leaf]
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=name)


def zeropower_via_newtonschulz5(matrix, steps=5):
    """Keller Jordan's function as published with Muon, in float64."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_is_keller_jordan_s_on_each_matrix_and_adamw_elsewhere():
    rate, decay, beta, adam_rate = 0.02, 0.1, 0.9, 3e-3
    actual, _ = run(Muon(rate, decay, OFF, STEADY, momentum=beta, adam_learning_rate=adam_rate))
    # His matrices are [outputs, inputs], as torch keeps them; ours the other way round, and stacked by layer.
    views = {
        "query": lambda p: [layer.reshape(12, 12).T for layer in p],
        "up": lambda p: [layer.T for layer in p],
        "down": lambda p: [p.T],
    }
    params = {name: [m.astype(np.float64) for m in view(normal(99)[name])] for name, view in views.items()}
    buffers = {name: [np.zeros_like(m) for m in matrices] for name, matrices in params.items()}
    for gradient in GRADIENTS:
        for name, view in views.items():
            for i, g in enumerate(view(gradient[name].astype(np.float64))):
                buffers[name][i] = beta * buffers[name][i] + (1 - beta) * g
                update = (1 - beta) * g + beta * buffers[name][i]
                update = zeropower_via_newtonschulz5(update) * max(1, g.shape[0] / g.shape[1]) ** 0.5
                params[name][i] = params[name][i] * (1 - rate * decay) - rate * update
    for name, view in views.items():
        for ours, his in zip(view(actual[name]), params[name], strict=True):
            np.testing.assert_allclose(ours, his, atol=2e-6, err_msg=name)
    adam, _ = run(AdamW(adam_rate, decay, OFF, STEADY, epsilon=1e-10))
    assert_close(
        {name: actual[name] for name in ("embedding", "scale")}, {n: adam[n] for n in ("embedding", "scale")}
    )


def test_muon_without_momentum_equals_optax_s():
    # With momentum they differ: optax corrects its bias, the published definition doesn't.
    dimensions = {
        name: role.matrix and optax.contrib.MuonDimensionNumbers(*role.matrix) for name, role in ROLES.items()
    }
    transform = optax.contrib.muon(0.02, beta=0.0, weight_decay=0.1, muon_weight_dimension_numbers=dimensions)
    expected, _ = run_optax(transform)
    actual, _ = run(Muon(0.02, 0.1, OFF, STEADY, momentum=0.0))
    names = [name for name, role in ROLES.items() if role.matrix]
    assert_close({n: actual[n] for n in names}, {n: expected[n] for n in names}, 1e-5)


def test_newton_schulz_brings_singular_values_near_one():
    for shape in ((3, 16, 16), (2, 8, 40), (40, 8)):
        steps = links.orthogonalize(jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32))
        values = np.linalg.svd(np.asarray(steps), compute_uv=False)
        assert values.max() < 1.3 and np.median(values) > 0.6
        assert values.shape[-1] == min(shape[-2:])


def test_schedule_free_equals_optax_s_at_a_steady_rate():
    transform = optax.contrib.schedule_free_adamw(1e-2, b1=0.8, b2=0.97, weight_decay=0.0)
    expected, expected_state = run_optax(transform)
    optimizer = ScheduleFree(1e-2, 0.0, OFF, STEADY, beta1=0.8, beta2=0.97)
    actual, state = run(optimizer)
    assert_close(actual, expected)
    averaged = optax.contrib.schedule_free_eval_params(expected_state, expected)
    assert_close(evaluation_params(state, actual), averaged, 2e-6)


def test_schedule_free_follows_its_paper_s_recursion_through_warm_up_and_decay_of_weights():
    optimizer = ScheduleFree(1e-2, 0.5, OFF, Constant(0.25), beta1=0.8, beta2=0.97)
    actual, state = run(optimizer)
    averaged = evaluation_params(state, actual)
    for name, start in normal(99).items():
        x = z = y = start.astype(np.float64)
        v, weights = np.zeros_like(z), 0.0
        for t, gradient in enumerate(GRADIENTS, 1):
            g, rate = gradient[name].astype(np.float64), 1e-2 * min(1, t / 6)
            v = 0.97 * v + 0.03 * g**2
            z = z - rate * (g / (np.sqrt(v / (1 - 0.97**t)) + 1e-8) + 0.5 * ROLES[name].decay * y)
            weights += rate**2
            x = x + rate**2 / weights * (z - x)
            y = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(actual[name], y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(averaged[name], x, rtol=1e-5, atol=1e-6)


# ---- what all of them promise ----


@pytest.mark.parametrize("cls", MEMBERS)
def test_two_rates_under_vmap_equal_two_runs_alone(cls):
    solo = [cls(learning_rate=rate, clip_norm=clip) for rate, clip in ((1e-2, 0.5), (3e-3, OFF))]
    packed_rows = jax.tree.map(lambda *columns: np.stack(columns), *[tables(o, NextToken(), 3) for o in solo])
    params = jax.tree.map(lambda p: jnp.stack([p, p]), normal(99))
    state = jax.vmap(lambda p: optimizers.init(solo[0], ROLES, p))(params)

    @jax.jit
    def step(params, state, gradient, hyper):
        def one(params, state, hyper):
            updates, new = optimizers.update(solo[0], ROLES, gradient, state, params, hyper)
            return optax.apply_updates(params, updates), new

        return jax.vmap(one)(params, state, hyper)

    for index, gradient in enumerate(GRADIENTS[:3]):
        row = {name: column[:, index] for name, column in packed_rows.items()}
        params, state = step(params, state, gradient, row)
    for member, optimizer in enumerate(solo):
        alone, _ = run(optimizer, gradients=GRADIENTS[:3])
        assert_close({name: p[member] for name, p in params.items()}, alone, 2e-6)


@pytest.mark.parametrize("cls", MEMBERS)
def test_a_layer_of_a_stack_moves_as_it_would_alone(cls):
    optimizer = cls(clip_norm=OFF, **({"factored_from": 4} if cls is Adafactor else {}))
    stacked, _ = run(optimizer, gradients=GRADIENTS[:3])
    alone_roles = ROLES | {
        "query": Role("query", ("embed", "heads", "head_dim"), True, ((0,), (1, 2))),
        "up": Role("up", ("embed", "mlp"), True, ((0,), (1,))),
    }
    second = lambda tree: {n: p[1] if n in ("query", "up") else p for n, p in tree.items()}  # noqa: E731
    alone, _ = run(optimizer, second(normal(99)), [second(g) for g in GRADIENTS[:3]], alone_roles)
    assert_close(second(stacked), alone)


@pytest.mark.parametrize("cls", MEMBERS)
def test_only_roles_that_decay_shrink_without_a_gradient(cls):
    optimizer = cls(learning_rate=0.1, weight_decay=0.5, schedule=STEADY)
    optimizer = dataclasses.replace(optimizer, adam_learning_rate=0.1) if cls is Muon else optimizer
    start = normal(99)
    params, _ = run(optimizer, gradients=[jax.tree.map(np.zeros_like, start)])
    for name, role in ROLES.items():
        factor = 1 - 0.1 * 0.5 * role.decay
        np.testing.assert_allclose(params[name], start[name] * factor, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("cls", MEMBERS)
def test_one_executable_serves_all_values_and_its_state_keeps_its_types(cls):
    optimizer = cls(average=None if cls is ScheduleFree else 0.9)
    params, gradient = normal(99), GRADIENTS[0]
    state = optimizers.init(optimizer, ROLES, params)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    traces = 0

    @jax.jit
    def step(params, state, hyper):
        nonlocal traces
        traces += 1
        return optimizers.update(optimizer, ROLES, gradient, state, params, hyper)

    for other in (
        optimizer,
        dataclasses.replace(optimizer, learning_rate=0.0, weight_decay=0.0, clip_norm=OFF),
    ):
        hyper = {name: column[0] for name, column in tables(other, NextToken(z_loss=0.1), 5).items()}
        updates, new = step(params, state, hyper)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    assert traces == 1
    assert all(np.isfinite(u).all() for u in updates.values())


def test_clipping_scales_the_whole_gradient_to_its_norm():
    plain = {"weight_decay": 0.0, "momentum": 0.0, "learning_rate": 1.0, "schedule": STEADY}
    start, gradient = normal(99), GRADIENTS[0]
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    for clip, factor in ((norm / 4, 0.25), (2 * norm, 1.0), (OFF, 1.0)):
        params, _ = run(SGD(clip_norm=float(clip), **plain), gradients=[gradient])
        assert_close(params, {n: start[n] - factor * gradient[n] for n in start})


def test_the_average_follows_its_recursion_and_is_what_evaluation_sees():
    optimizer, average = AdamW(1e-2, average=0.8), normal(99)
    for done, (params, state) in enumerate(trajectory(optimizer), 1):
        decay = min(0.8, done / (done + 9))
        average = {name: decay * average[name] + (1 - decay) * params[name] for name in average}
        assert_close(evaluation_params(state, params), average)
    assert_close(params, run(dataclasses.replace(optimizer, average=None))[0], 0)
    without = AdamW(1e-2)
    assert evaluation_params(optimizers.init(without, ROLES, params), params) is params


def test_norms_by_role_are_numpy_s_over_all_leaves_of_a_role():
    tree = {"a": normal(1), "b": normal(2)}
    roles = {"a": ROLES, "b": ROLES | {"down": dataclasses.replace(ROLES["down"], name="out")}}
    norms = norms_by_role(roles, tree)
    assert norms.keys() == {"down", "embedding", "out", "query", "scale", "up"}
    both = np.concatenate([tree["a"]["up"].ravel(), tree["b"]["up"].ravel()])
    np.testing.assert_allclose(norms["up"], np.linalg.norm(both), rtol=1e-6)
    np.testing.assert_allclose(norms["out"], np.linalg.norm(tree["b"]["down"]), rtol=1e-6)


def test_tables_hold_every_hyperparameter_and_weight_at_every_step():
    optimizer = Muon(schedule=Cosine(0.1), average=0.99)
    table = tables(optimizer, NextToken(z_loss=1e-4), 50)
    assert set(table) == {
        *("learning_rate", "adam_learning_rate", "weight_decay", "clip_norm", "momentum", "beta1", "beta2"),
        *("epsilon", "average_rate", "weights/next_token", "weights/z_loss"),
    }
    assert all(column.shape == (50,) and column.dtype == np.float32 for column in table.values())
    factor = optimizer.schedule.table(50)
    assert (table["learning_rate"] == (0.02 * factor).astype(np.float32)).all()
    assert (table["adam_learning_rate"] == (3e-3 * factor).astype(np.float32)).all()
    assert (table["weights/z_loss"] == np.float32(1e-4)).all()


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (AdamW(learning_rate=-1e-3), "learning_rate is -0.001"),
        (AdamW(learning_rate=float("nan")), "learning_rate is nan"),
        (AdamW(learning_rate=OFF), "learning_rate is inf"),
        (AdamW(weight_decay=-0.1), "weight_decay is -0.1"),
        (AdamW(beta2=1.0), "beta2 is 1.0"),
        (Muon(momentum=1.5), "momentum is 1.5"),
        (SGD(clip_norm=0.0), "clip_norm is 0"),
        (Lion(average=1.0), "average is 1.0"),
        (ScheduleFree(average=0.9), "average must be none"),
        (AdamW(schedule=Cosine(warmup_fraction=2.0)), "warmup_fraction is 2.0"),
    ],
    ids=str,
)
def test_hyperparameters_that_make_no_sense_are_refused(optimizer, words):
    with pytest.raises(UserError, match=words):
        config.check(optimizer)


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(UserError, match="at least one step"):
        tables(AdamW(), NextToken(), 0)


@pytest.mark.parametrize("cls", MEMBERS)
def test_defaults_are_valid_and_survive_json(cls):
    config.check(cls())
    assert config.from_json(Optimizer, config.to_json(cls())) == cls()


POSTPONED = """
from __future__ import annotations
import dataclasses
from llm_jax.optimizers import SGD
from llm_jax.schedules import Constant

SCALES = {"only": 1}
get_config = None

@dataclasses.dataclass(frozen=True)
class Warm(SGD, kind="sgd_of_a_test"):
    heat: float = 0.5

@dataclasses.dataclass(frozen=True)
class Steps(Constant, kind="constant_of_a_test"):
    share: float = 2.0
"""


def test_fields_are_found_in_files_that_postpone_their_types(tmp_path):
    (tmp_path / "postponed.py").write_text(POSTPONED)
    module, _ = experiment_file.load_experiment(str(tmp_path / "postponed.py"))
    np.testing.assert_array_equal(tables(module.Warm(), NextToken(), 3)["heat"], np.float32([0.5] * 3))
    with pytest.raises(UserError, match=r"optimizer\.heat is -1"):
        module.Warm(heat=-1.0).validate()
    with pytest.raises(UserError, match=r"optimizer\.schedule\.share is 2"):
        module.Steps().validate()
