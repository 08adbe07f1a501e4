"""Decoding over a state gives what the whole forward pass gives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import parameters

from llm_jax.models import Layout
from llm_jax.models.parametrization import CompleteP
from llm_jax.models.positions import Learned, NoPositions, Rotary, Sinusoidal
from llm_jax.models.transformer import Attending, LayerNorm, Transformer

TINY = Transformer(layers=1, width=16, heads=4, kv_heads=2, vocabulary=31)
T = 14
TOKENS = jax.random.randint(jax.random.key(1), (3, T), 0, TINY.vocabulary)
VARIANTS = {
    "rotary": {},
    "windows": {"windows": (4, None), "layers": 3},
    "gpt2": {
        "positions": Learned(T),
        "norm": LayerNorm(),
        "bias": True,
        "activation": "gelu",
        "parametrization": CompleteP(4, 2, 3),
    },
    "post": {"positions": Sinusoidal(), "norm_position": "post"},
    "gemma": {
        "rotations": (Rotary(100.0), Rotary()),
        "windows": (4, None),
        "layers": 2,
        "attention": Attending(softcap=2.0),
        "norm_position": "sandwich",
    },
    "none": {"positions": NoPositions(), "qk_norm": True, "kv_heads": 1, "windows": (5,)},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def build(name, unroll=False):
    """(params, the whole pass over TOKENS' shape, the model, decode), compiled once for all tests."""
    model = dataclasses.replace(TINY, **VARIANTS[name]).build(Layout(unroll=unroll))
    params = parameters(model)
    whole = jax.jit(lambda tokens: model.apply(params, {"tokens": tokens}, None).hidden)
    return params, whole, model, jax.jit(model.decode)


def consecutive(start_B, length):
    return jnp.asarray(start_B)[:, None] + jnp.arange(length)


@pytest.mark.parametrize("unroll", [True, False])
def test_prefill_and_single_steps_equal_the_whole_pass(unroll):
    params, whole, model, decode = build("windows", unroll)
    prompt, rows = 6, jnp.zeros(3, jnp.int32)
    state = model.init_state(3, T)
    hidden, state = decode(params, state, TOKENS[:, :prompt], consecutive(rows, prompt), rows + prompt)
    parts = [hidden]
    for t in range(prompt, T):
        hidden, state = decode(params, state, TOKENS[:, t : t + 1], consecutive(rows + t, 1), rows + 1)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole(TOKENS), atol=1e-5)


@each_variant
def test_ragged_rows_ignore_their_padding(name):
    params, whole, model, decode = build(name)
    expected = whole(TOKENS)
    state, seen = model.init_state(3, T), np.zeros(3, np.int32)
    for lengths in (
        [5, 1, 3],
        [2, 4, 0],
        [1, 1, 1],
        [0, 5, 4],
    ):  # with windows of 4: more than a ring at once
        chunk = np.full((3, 5), 30)
        for row, length in enumerate(lengths):
            chunk[row, :length] = TOKENS[row, seen[row] : seen[row] + length]
        hidden, state = decode(params, state, jnp.asarray(chunk), consecutive(seen, 5), jnp.asarray(lengths))
        for row, length in enumerate(lengths):
            there = expected[row, seen[row] : seen[row] + length]
            np.testing.assert_allclose(hidden[row, :length], there, atol=1e-5)
        seen += lengths


@each_variant
def test_a_row_that_starts_anew_forgets_its_past_and_leaves_the_others_alone(name):
    params, whole, model, decode = build(name)
    expected, fresh = whole(TOKENS), whole(TOKENS[::-1])
    state, start = model.init_state(3, T), jnp.zeros(3, jnp.int32)
    for length in (5, 4):
        chunk = jax.lax.dynamic_slice_in_dim(TOKENS, int(start[0]), 5, axis=1)
        _, state = decode(params, state, chunk, consecutive(start, 5), jnp.full(3, length))
        start += length
    start = start.at[0].set(0)
    for t in range(3):
        chunk = jnp.zeros((3, 5), jnp.int32).at[:, 0].set(TOKENS[:, 9 + t]).at[0, 0].set(TOKENS[2, t])
        hidden, state = decode(params, state, chunk, consecutive(start, 5), jnp.ones(3, jnp.int32))
        np.testing.assert_allclose(hidden[0, 0], fresh[0, t], atol=1e-5)
        np.testing.assert_allclose(hidden[1:, 0], expected[1:, 9 + t], atol=1e-5)
        start += 1


def test_a_window_needs_no_more_room_than_itself():
    state = build("windows")[2].init_state(2, T)
    assert state["body"]["0"]["value"].shape == (1, 2, 2, 4, 4)
    assert state["body"]["1"]["value"].shape == (1, 2, 2, T, 4)
    assert state["tail"]["0"]["value"].shape == (1, 2, 2, 4, 4)


def test_layers_that_run_as_straight_code_change_their_caches_where_they_lie():
    model = TINY.build(Layout(unroll=True))
    state = model.init_state(2, 32)
    step = jax.jit(model.decode, donate_argnums=1)
    one = jnp.ones((2, 1), jnp.int32)
    compiled = step.lower(parameters(model), state, one, one, one[:, 0]).compile()
    for leaf in jax.tree.leaves(state):
        shape = ",".join(map(str, leaf.shape))
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )


@pytest.mark.parametrize("name", ["rotary", "windows"])
def test_a_row_that_has_nothing_and_gets_nothing_stays_finite(name):
    params, _, model, decode = build(name)
    zeros = jnp.zeros(3, jnp.int32)
    hidden, state = decode(params, model.init_state(3, T), TOKENS[:, :1], zeros[:, None], zeros)
    assert np.isfinite(hidden).all() and not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_the_state_has_the_compute_dtype_and_names_its_axes():
    model = dataclasses.replace(TINY, dtype="bfloat16").build(Layout(unroll=False))
    state = model.init_state(2, T)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    axes = model.state_axes(state)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(leaf.ndim, len(names)), state, axes)
    assert axes["body"]["0"]["key"] == ("layers", "batch", "kv_heads", "head_dim", "time")
