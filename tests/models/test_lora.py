"""LoRA: it starts at the model itself, learns two thin matrices a matrix, and merges into the same model."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.losses import NextToken
from llm_jax.models import Layout, counting
from llm_jax.models.lora import MATRICES, LoRA
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.step import make_init, make_step, state_shardings

BASE = Transformer(layers=3, width=16, heads=4, kv_heads=2, vocabulary=32, windows=(None, 4), bias=True)
CONFIG = LoRA(BASE, rank=3, alpha=5.0)
RANDOM = np.random.default_rng(0)
BATCH = {"tokens": RANDOM.integers(0, 32, (4, 12)), "targets": RANDOM.integers(0, 32, (4, 12))}
BATCH |= {"mask": np.ones((4, 12), np.float32)}
HYPER = {"learning_rate": 0.03, "weight_decay": 0.0, "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.95}
HYPER |= {"epsilon": 1e-8, "weights/next_token": 1.0, "weights/z_loss": 0.0}


def random_params(model, seed=0):
    """Parameters without a zero, those that start there too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.unembed(params, model.apply(params, BATCH, None).hidden)


@pytest.fixture(scope="module")
def trained():
    """The state before and after three steps."""
    model = CONFIG.build()
    roles = model.roles(jax.eval_shape(model.init, jax.random.key(0)))
    before = jax.jit(make_init(model, AdamW(), roles))(jax.random.PRNGKey(0))
    step, state = jax.jit(make_step(model, NextToken(), AdamW(), roles)), before
    for _ in range(3):
        state, _ = step(state, BATCH, {name: jnp.float32(x) for name, x in HYPER.items()})
    return model, before, state


@pytest.mark.parametrize("unroll", [True, False])
def test_before_training_it_is_the_base_model_to_the_bit(unroll):
    base, model = BASE.build(Layout(unroll=unroll)), CONFIG.build(Layout(unroll=unroll))
    params = model.init(jax.random.key(0)) | random_params(base)
    assert np.array_equal(logits(model, params), logits(base, params))
    merged = model.merge(params)
    jax.tree.map(np.testing.assert_array_equal, merged, {name: params[name] for name in merged})


def test_only_thin_matrices_are_trained(trained):
    model, before, after = trained
    assert set(after.trained) == {"lora"} and set(after.frozen) == {"embed", "body", "tail", "norm"}
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), before.trained, after.trained)
    assert min(jax.tree.leaves(moved)) > 0
    sizes = counting.count_parameters(model)["N_total"] - counting.count_parameters(BASE.build())["N_total"]
    assert sum(leaf.size for leaf in jax.tree.leaves(after.trained)) == sizes
    assert counting.count_parameters(model)["N_trained"] == sizes


def test_merged_it_is_the_same_model(trained):
    model, _, state = trained
    params = state.frozen | state.trained
    apart, merged = logits(model, params), logits(BASE.build(), model.merge(params))
    assert abs(apart - logits(BASE.build(), state.frozen)).max() > 0.1  # it has learned something
    np.testing.assert_allclose(merged, apart, atol=1e-4, rtol=0)


def test_its_gradient_is_that_of_the_sum_of_the_matrices():
    """W + alpha / rank A B written down for one matrix, and differentiated by the chain rule."""
    model, base = LoRA(BASE, rank=3, alpha=5.0, matrices=("out",)).build(), BASE.build()
    params = random_params(model)

    def loss(of, params):
        return jnp.square(logits(of, params)).mean()

    found = jax.jit(jax.grad(lambda lora: loss(model, params | {"lora": lora})))(params["lora"])
    plain = {name: part for name, part in params.items() if name != "lora"}
    for group in ("body", "tail"):
        for place, learned in params["lora"][group].items():
            pair = learned["mixer"]["out"]
            a, b = (np.asarray(pair[side], np.float64) for side in ("thin", "wide"))
            whole = plain[group][place]["mixer"]["out"] + 5 / 3 * np.einsum("lhkr,lrd->lhkd", a, b)
            plain[group][place]["mixer"]["out"] = jnp.float32(whole)
    of_whole = jax.jit(jax.grad(lambda params: loss(base, params)))(plain)
    for group in ("body", "tail"):
        for place, learned in params["lora"][group].items():
            pair, of = learned["mixer"]["out"], of_whole[group][place]["mixer"]["out"]
            right = {
                "thin": 5 / 3 * np.einsum("lhkd,lrd->lhkr", of, pair["wide"]),
                "wide": 5 / 3 * np.einsum("lhkd,lhkr->lrd", of, pair["thin"]),
            }
            for side in right:
                np.testing.assert_allclose(
                    found[group][place]["mixer"]["out"][side], right[side], rtol=1e-3, atol=1e-5
                )


def test_thin_matrices_lie_as_the_matrices_beside_which_they_stand():
    model = CONFIG.build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    roles = model.roles(params)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    state = jax.eval_shape(make_init(model, AdamW(), roles), jax.random.PRNGKey(0))
    mixer = state_shardings(state, roles, mesh).trained["lora"]["body"]["0"]["mixer"]
    assert mixer["query"]["thin"].spec == jax.P(None, "fsdp", None)
    assert mixer["query"]["wide"].spec == jax.P(None, None, "tensor", None)
    assert mixer["out"]["thin"].spec == jax.P(None, "tensor", None, None)
    assert mixer["out"]["wide"].spec == jax.P(None, None, "fsdp")
    of = roles["lora"]["body"]["0"]["mixer"]["out"]
    assert (of["thin"].matrix, of["wide"].matrix) == (((1, 2), (3,)), ((1,), (2,)))


def test_its_training_costs_less_than_that_of_the_whole():
    spec = {"tokens": jax.ShapeDtypeStruct((2, 16), np.int32)}
    part = counting.count(LoRA(Transformer(vocabulary=64), rank=1), spec)["flops_exact_per_token"]
    whole = counting.count(Transformer(vocabulary=64), spec)["flops_exact_per_token"]
    assert 0.6 * whole < part < 0.8 * whole  # the gradient of the matrices themselves is a third


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "model.rank is 0; it is at least 1"),
        ({"alpha": 0.0}, "model.alpha is 0.0; it is a positive number"),
        ({"matrices": ("querry",)}, "no matrix 'querry'; did you mean 'query'?"),
        ({"matrices": ()}, "no matrix ''"),
        ({"base": CONFIG}, "model.base is a lora"),
    ],
)
def test_what_cannot_be_learned_is_one_line(changes, words):
    with pytest.raises(UserError) as error:
        LoRA(**{"base": BASE} | changes).validate()
    assert words in str(error.value)
    with pytest.raises(UserError, match="no part 'embedd' there; did you mean 'embed'"):
        LoRA(BASE, whole=("embedd",)).build()


@pytest.mark.parametrize(("tied", "whole"), [(True, ("embed",)), (False, ("embed", "head"))])
def test_rows_of_new_tokens_are_trained_where_they_are_read_and_where_they_are_said(tied, whole, monkeypatch):
    monkeypatch.setattr(Transformer, "record", lambda self, data: {"new_tokens": 2})
    data, base = types.SimpleNamespace(vocabulary=32), dataclasses.replace(BASE, tied=tied)
    assert LoRA(base, whole=whole).beginning(data, None) is None
    with pytest.raises(UserError, match=f"2 special tokens .*model.whole={','.join(whole)}, trains"):
        LoRA(base, whole=whole[:-1]).beginning(data, None)


def test_experts_are_no_matrices_of_every_token():
    assert "expert_up" not in MATRICES
