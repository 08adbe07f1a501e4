"""Weights of eight bits compute what their values say, of any matrix and on any mesh, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import parameters

from llm_jax.inference import opening
from llm_jax.inference.batching import Batcher, Request, complete
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import open_model
from llm_jax.inference.quantising import quantise
from llm_jax.interop import huggingface
from llm_jax.models import Layout
from llm_jax.models.experts import Experts
from llm_jax.models.int8 import Int8
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import MeshConfig, make_mesh, shardings

SCAN = Layout(unroll=False, attention="reference")  # the least to compile


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def widened(small, params):
    """Parameters with matrices of floating-point numbers again, of the shapes of `params`."""

    def leaf(leaf, like):
        if not isinstance(leaf, Int8):
            return leaf
        matrix = leaf.values * leaf.scales[..., None]
        return (matrix if matrix.shape == like.shape else jnp.swapaxes(matrix, -1, -2)).reshape(like.shape)

    return jax.tree.map(leaf, small, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


def test_int8_weights_compute_what_their_values_say_in_a_quarter_of_the_memory():
    wide = Transformer(layers=2, width=64, heads=4, kv_heads=2, vocabulary=257, tied=False)
    params = parameters(wide.build(SCAN))
    small = jax.jit(quantise)(params)
    assert bytes_of(small) < 0.3 * bytes_of(params)

    same = widened(small, params)
    model, tokens = wide.build(SCAN), jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    whole = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}).hidden))
    # One row is summed in float32, a few are multiplied in 16 bits.
    np.testing.assert_allclose(whole(small, tokens), whole(same, tokens), atol=3e-3)
    one = tokens[:, :1]
    np.testing.assert_allclose(whole(small, one), whole(same, one), atol=1e-4)
    for found, weight in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, weight, atol=0.51 / 127 * np.abs(weight).max())
    request = Request(np.asarray(tokens[0]), max_tokens=6)
    answers = [complete(Batcher(Engine(wide, p, layout=SCAN), 1), [request])[0].ids for p in (small, same)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rows", [1, 2, 16, 128, 129])
def test_int8_products_of_any_number_of_rows_are_those_of_the_widened_matrix(rows):
    random = np.random.default_rng(rows)
    small = Int8(
        random.integers(-127, 128, (40, 96)).astype(np.int8), random.uniform(0.01, 0.1, 40), outputs=(40,)
    )
    x = random.normal(size=(rows, 96)).astype(np.float32)
    x[0] *= 1e-6
    x[-1, 3] = 100.0  # one entry far larger than the others
    expected = x.astype(np.float64) @ (small.values * small.scales[:, None]).T
    found = jax.jit(lambda x: jax.tree.map(jnp.asarray, small).product(x))(x)
    scale = np.abs(x).max(-1, keepdims=True) * np.sqrt((small.values * small.scales[:, None]) ** 2).sum(-1)
    assert np.all(np.abs(found - expected) <= 4 * scale / 127 / 508)


@pytest.mark.parametrize("unroll", [True, False])
def test_experts_of_eight_bits_compute_what_their_values_say_in_a_quarter_of_the_memory(unroll):
    sparse = Transformer(
        layers=2, width=64, heads=4, vocabulary=257, experts=Experts(count=16, active=3, width=48)
    )
    params = parameters(sparse.build())
    small = jax.jit(quantise)(params)
    assert bytes_of(small) < 0.3 * bytes_of(params)
    assert small["body"]["0"]["mlp"]["expert_up"].values.shape == (2, 16, 48, 64)
    model = sparse.build(Layout(unroll=unroll, attention="reference"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (1, 200)))  # more rows than FEW: no digits
    whole = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}).hidden))
    np.testing.assert_allclose(whole(small, tokens), whole(widened(small, params), tokens), atol=2e-4)
    np.testing.assert_allclose(whole(small, tokens[:, :7]), whole(small, tokens)[:, :7], atol=5e-3)


def test_on_a_mesh_eight_bits_give_the_tokens_of_one_device_and_nothing_is_replicated_to_be_read(capfd):
    config = Transformer(
        layers=1, width=32, heads=4, kv_heads=2, vocabulary=37, experts=Experts(count=4, active=2, width=32)
    )
    model, params = config.build(SCAN), parameters(config.build())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = jax.tree.map(lambda role: role.axes, model.roles(params))
    small = jax.jit(quantise)(params)
    spread = jax.jit(quantise)(jax.device_put(params, shardings(params, axes, mesh)))
    assert "tensor" in str(spread["body"]["0"]["mixer"]["query"].values.sharding.spec)
    requests = [Request(np.arange(3 + n), max_tokens=12) for n in range(4)]
    alone = complete(Batcher(Engine(config, small, layout=SCAN), 4), requests)
    there = complete(Batcher(Engine(config, spread, mesh=mesh, layout=SCAN), 4), requests)
    assert [answer.ids for answer in alone] == [answer.ids for answer in there]
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_each_parameter_is_converted_before_the_next_is_read(dtype, tmp_path, monkeypatch):
    config = Transformer(layers=2, width=64, heads=4, vocabulary=64, tied=False)
    huggingface.save(tmp_path / "tiny", config, parameters(config.build()))
    whole, peak, before = bytes_of(open_model(tmp_path / "tiny").params), [], None
    convert = opening._converted

    def watched(*asked):
        found = jax.block_until_ready(convert(*asked))
        peak.append(bytes_of(jax.live_arrays()) - before)
        return found

    monkeypatch.setattr(opening, "_converted", watched)
    before = bytes_of(jax.live_arrays())
    opened = open_model(tmp_path / "tiny", dtype)
    assert max(peak) < 0.75 * whole
    assert bytes_of(opened.params) < 0.55 * whole
    assert opened.config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
