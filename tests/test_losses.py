"""The sliced next-token loss: equal to the plain one, and never holding all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import losses
from llm_jax.config import UserError, check
from llm_jax.losses import NextToken, token_losses, total
from llm_jax.models import Model, Output, Term

BATCH, WIDTH, VOCABULARY = 4, 8, 300
WEIGHTS = {"next_token": 1.0, "z_loss": 0.01}


def make_model(tied: bool = False, cap: float | None = None) -> Model:
    """The smallest model with everything a head may have: tied or not, capped logits, an auxiliary term."""

    def init(key):
        keys = jax.random.split(key, 3)
        head = {} if tied else {"head": jax.random.normal(keys[1], (WIDTH, VOCABULARY))}
        return {
            "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
            "scale": 1 + 0.1 * jax.random.normal(keys[2], (WIDTH,)),
        } | head

    def apply(params, batch, key):
        hidden = jnp.tanh(params["embedding"][batch["tokens"]] * params["scale"])
        return Output(hidden, {"shrink": Term(jnp.sum(params["scale"] ** 2), jnp.float32(WIDTH), 0.1)})

    def unembed(params, hidden):
        logits = hidden @ (params["embedding"].T if tied else params["head"])
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    name = "embedding" if tied else "head"
    return Model(init, apply, unembed, unembed_params=lambda params: {name: params[name]})


def make_batch(time: int, rows: int = BATCH, seed: int = 0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (rows, time + 1), 0, VOCABULARY)
    keep = jax.random.uniform(keys[1], (rows, 1))  # rows differ much in how many of their targets count
    mask = (jax.random.uniform(keys[2], (rows, time)) < keep).at[0, 0].set(True)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask.astype(jnp.float32)}


def plain_terms(model, params, batch, weights):
    """The definition: all logits at once."""
    hidden, aux = model.apply(params, batch, None)
    logits = model.unembed(params, hidden)
    log_probability = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probability, batch["targets"][..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    mask, count = batch["mask"], batch["mask"].sum()
    return {
        "next_token": Term((nats * mask).sum(), count, weights["next_token"]),
        "z_loss": Term((normaliser**2 * mask).sum(), count, weights["z_loss"]),
    } | aux


def sliced_loss(model, params, batch, weights=None, counts=None):
    return total(NextToken().terms(model, params, batch, None, weights or WEIGHTS), counts)


def plain_loss(model, params, batch, weights=None):
    return total(plain_terms(model, params, batch, weights or WEIGHTS))


def assert_trees_close(actual, expected, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
    )


def test_a_total_is_the_sum_of_weighted_means_and_counts_may_come_from_elsewhere():
    terms = {"a": Term(6.0, 3.0, 2.0), "empty": Term(0.0, 0.0), "c": Term(8.0, 2.0)}
    assert float(total(terms)) == 2 * 6 / 3 + 8 / 2
    assert float(total(terms, {"a": 12.0, "empty": 5.0, "c": 16.0})) == 2 * 6 / 12 + 8 / 16


@pytest.mark.parametrize(
    ("time", "head"),
    [(1, {}), (2, {}), (7, {"tied": True}), (64, {"cap": 5.0}), (65, {"tied": True}), (65, {"cap": 5.0})],
)
def test_value_and_every_gradient_equal_those_of_the_plain_loss(time, head, monkeypatch):
    monkeypatch.setitem(
        losses.SLICE_BYTES, "cpu", 4 * BATCH * VOCABULARY * 20
    )  # several slices of up to 20 steps
    model, batch = make_model(**head), make_batch(time)
    params = model.init(jax.random.key(1))
    sliced = jax.jit(jax.value_and_grad(functools.partial(sliced_loss, model)))(params, batch)
    plain = jax.jit(jax.value_and_grad(functools.partial(plain_loss, model)))(params, batch)
    assert_trees_close(sliced, plain)


def test_value_and_gradient_equal_torch_s_cross_entropy():
    torch = pytest.importorskip("torch")
    model, batch = make_model(), make_batch(33)
    params = model.init(jax.random.key(1))
    weights = {"next_token": 1.0, "z_loss": 0.0}
    hidden = np.asarray(model.apply(params, batch, None).hidden)
    head = torch.tensor(np.asarray(params["head"]), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(np.where(batch["mask"] > 0, batch["targets"], -100)).long()
    logits = torch.tensor(hidden, dtype=torch.float64) @ head
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    terms = NextToken().terms(model, params, batch, None, weights)
    np.testing.assert_allclose(terms["next_token"].sum / terms["next_token"].count, loss.item(), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: sliced_loss(model, p, batch, weights)))(params)["head"]
    np.testing.assert_allclose(gradient, head.grad.numpy(), atol=1e-6)


def array_shapes(jaxpr):
    """The shape of every array that a jaxpr makes, in loops and custom derivatives too."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from array_shapes(inner)


def test_no_array_holds_all_logits_forward_or_backward():
    time = 64
    model, batch = make_model(), make_batch(time)
    params = model.init(jax.random.key(1))

    def largest(loss):
        forward = jax.make_jaxpr(loss)(params)
        backward = jax.make_jaxpr(jax.value_and_grad(loss))(params)
        return [max(map(np.prod, array_shapes(j.jaxpr))) for j in (forward, backward)]

    everything = BATCH * time * VOCABULARY
    assert min(largest(lambda p: plain_loss(model, p, batch))) >= everything
    assert max(largest(lambda p: sliced_loss(model, p, batch))) <= everything / 2
    scored = jax.make_jaxpr(lambda p: token_losses(model, p, batch))(params)
    assert max(map(np.prod, array_shapes(scored.jaxpr))) <= everything / 2


@pytest.mark.parametrize(("rows", "vocabulary", "most"), [(4, 300, 32), (16, 2048, 16), (8, 4096, 16)])
def test_logits_of_a_slice_fit_the_bytes_allowed(rows, vocabulary, most):
    head = {"head": jnp.zeros((WIDTH, vocabulary))}
    length = losses._slice_length(lambda p, h: h @ p["head"], head, jnp.zeros((rows, 64, WIDTH)))
    assert length == most and length * rows * vocabulary * 4 <= losses.SLICE_BYTES["cpu"]


def test_micro_batches_with_uneven_masks_add_up_to_the_big_batch():
    model, batch = make_model(), make_batch(16, rows=8)
    params = model.init(jax.random.key(1))
    micro = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(4)]
    terms_of = jax.jit(lambda m: NextToken().terms(model, params, m, None, WEIGHTS))
    parts = [terms_of(m) for m in micro]
    counts = {name: sum(terms[name].count for terms in parts) for name in parts[0]}
    assert len({float(terms["next_token"].count) for terms in parts}) > 1, "the masks are to be uneven"

    @jax.jit
    def gradient(m, counts):
        return jax.grad(lambda p: sliced_loss(model, p, m, counts=counts))(params)

    add = functools.partial(jax.tree.map, lambda *leaves: sum(leaves))
    big = gradient(batch, None)
    assert_trees_close(add(*[gradient(m, counts) for m in micro]), big)
    mean_of_means = jax.tree.map(lambda x: x / 4, add(*[gradient(m, None) for m in micro]))
    assert np.abs(mean_of_means["head"] - big["head"]).max() > 1e-4


def test_counting_alone_leaves_no_forward_pass_behind():
    model, batch = make_model(), make_batch(16)
    params = model.init(jax.random.key(1))
    counting = lambda p, b: NextToken().terms(model, p, b, None, WEIGHTS)["next_token"].count  # noqa: E731
    compiled = jax.jit(counting).lower(params, batch).compile()
    assert compiled.cost_analysis()["flops"] <= batch["mask"].size


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    model, batch = make_model(), make_batch(8)
    batch["mask"] = jnp.zeros_like(batch["mask"])
    params = model.init(jax.random.key(1))
    terms = NextToken().terms(model, params, batch, None, WEIGHTS)
    del terms["shrink"]
    assert float(total(terms)) == 0.0
    gradient = jax.jit(jax.grad(lambda p: sliced_loss(model, p, batch)))(params)
    assert not np.asarray(gradient["head"]).any()


def test_masked_targets_move_nothing():
    model, batch = make_model(), make_batch(8)
    params = model.init(jax.random.key(1))
    other = batch | {"targets": jnp.where(batch["mask"] > 0, batch["targets"], 0)}
    assert (other["targets"] != batch["targets"]).any()
    grad = jax.jit(jax.value_and_grad(functools.partial(sliced_loss, model)))
    assert_trees_close(grad(params, other), grad(params, batch), 0)


def test_token_losses_are_the_terms_of_the_loss():
    model, batch = make_model(), make_batch(9)
    params = model.init(jax.random.key(1))
    nats = jax.jit(functools.partial(token_losses, model))(params, batch)
    logits = model.unembed(params, model.apply(params, batch, None).hidden)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, expected * batch["mask"], rtol=1e-6, atol=1e-6)
    term = NextToken().terms(model, params, batch, None, WEIGHTS)["next_token"]
    np.testing.assert_allclose(nats.sum(), term.sum, rtol=1e-6)


def test_a_gradient_in_another_direction_than_the_weights_is_refused_not_wrong():
    model, batch = make_model(), make_batch(8)
    params = model.init(jax.random.key(1))

    def only_z(p):
        return NextToken().terms(model, p, batch, None, WEIGHTS)["z_loss"].sum

    assert np.isnan(jax.grad(only_z)(params)["head"]).all()


def test_packed_members_match_solo_losses():
    model, batch = make_model(), make_batch(16)
    params = jax.vmap(model.init)(jax.random.split(jax.random.key(1), 2))
    weights = {"next_token": jnp.ones(2), "z_loss": jnp.array([0.0, 0.1])}
    grad = jax.jit(jax.value_and_grad(lambda p, w: sliced_loss(model, p, batch, w)))
    packed = jax.jit(jax.vmap(grad))(params, weights)
    for member in range(2):
        pick = functools.partial(jax.tree.map, lambda x, m=member: x[m])
        assert_trees_close(pick(packed), grad(pick(params), pick(weights)))


def test_rows_spread_over_devices_give_the_same_loss_and_meet_once_after_all_slices(monkeypatch):
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    monkeypatch.setitem(losses.SLICE_BYTES, "cpu", 4 * VOCABULARY * 2)  # slices of two steps on each device
    model, batch = make_model(), make_batch(16)
    params = model.init(jax.random.key(1))
    grad = jax.jit(jax.value_and_grad(functools.partial(sliced_loss, model)))
    expected = grad(params, batch)
    mesh = jax.make_mesh(
        (2, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        compiled = grad.lower(everywhere, spread).compile()
        assert_trees_close(compiled(everywhere, spread), expected)
    loops, _, main = compiled.as_text().partition("ENTRY ")
    assert "while(" in main and "all-reduce(" in main
    assert "all-reduce(" not in loops and "all-gather(" not in loops + main


def test_what_makes_no_sense_is_refused():
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"z_loss is {weight}"):
            check(NextToken(z_loss=weight))
    headless = Model(make_model().init, make_model().apply)
    params = headless.init(jax.random.key(1))
    with pytest.raises(UserError, match="no unembed"):
        NextToken().terms(headless, params, make_batch(4), None, WEIGHTS)
