"""The one table of roles covers every parameter, and says what its shape says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import plain_roles
from llm_jax.models.blocks import normalise
from llm_jax.models.experts import Experts
from llm_jax.models.positions import Learned
from llm_jax.models.roles import TABLE, roles
from llm_jax.models.transformer import Attending, LayerNorm, RMSNorm, Transformer

CONFIGS = [
    Transformer(
        layers=2, width=16, heads=4, vocabulary=31, tied=False, bias=True, qk_norm=True, norm=LayerNorm()
    ),
    Transformer(
        layers=5, width=16, vocabulary=31, windows=(3, None), positions=Learned(8), activation="gelu"
    ),
    Transformer(layers=2, width=16, vocabulary=31, qk_norm=True, norm=RMSNorm(gain=True), experts=Experts(3)),
    Transformer(width=16, vocabulary=31, qk_norm=True, attention=Attending(norm_over="heads")),
    Transformer(
        width=16, vocabulary=31, qk_norm=True, attention=Attending(norm_over="heads"), norm=RMSNorm(gain=True)
    ),
]


def leaves_with_roles(config):
    model = config.build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(model.roles(params)), strict=True))


def test_every_row_of_the_table_is_a_parameter_of_some_transformer():
    assert {role.name for config in CONFIGS for _, role in leaves_with_roles(config)} == set(TABLE)


@pytest.mark.parametrize("config", CONFIGS)
def test_axes_decay_and_matrices_fit_the_shapes(config):
    for leaf, role in leaves_with_roles(config):
        assert len(role.axes) == leaf.ndim
        matrix_dimensions = leaf.ndim - ("layers" in role.axes)
        vector = role.name.endswith(("bias", "scale", "gain"))
        assert role.decay == (matrix_dimensions >= 2 and not vector), role
        if role.matrix is None:
            assert not role.decay or role.name in ("embedding", "position", "head")
        else:
            inputs, outputs = role.matrix
            stack = [i for i, axis in enumerate(role.axes) if axis == "layers"]
            stack += [i for i, axis in enumerate(role.axes) if axis == "experts" and role.name != "router"]
            assert sorted([*stack, *inputs, *outputs]) == list(range(leaf.ndim))
            sides = [16, config.size_of_mlp, config.experts.count if config.experts else 16]
            assert all(np.prod([leaf.shape[i] for i in side]) in sides for side in role.matrix)


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(KeyError, match="'loudness' has no row"):
        roles({"block": {"loudness": jnp.zeros(3)}})
    with pytest.raises(ValueError, match="its role has the axes"):
        roles({"block": {"query": jnp.zeros(3)}})


def test_outputs_of_matrices_have_the_scale_of_their_inputs_at_every_width():
    for width in (32, 256):
        params = (
            Transformer(layers=8, width=width, heads=4, vocabulary=61, tied=False)
            .build()
            .init(jax.random.key(0))
        )
        block = params["body"]["0"]
        for leaf in (block["mixer"]["query"], block["mlp"]["up"], params["head"]["head"]):
            assert float(leaf.std()) == pytest.approx(width**-0.5, rel=0.05)
        assert float(jnp.square(params["embed"]["embedding"]).sum(-1).mean()) == pytest.approx(1, rel=0.1)


def test_blocks_start_as_the_identity():
    model = Transformer(layers=3, width=16, vocabulary=31).build()
    params = model.init(jax.random.key(0))
    hidden = model.apply(params, {"tokens": jnp.arange(31)[None]}, None).hidden[0]
    embedding = params["embed"]["embedding"]
    np.testing.assert_allclose(
        hidden, normalise(embedding, jnp.ones(16), None, 1e-5, centre=False), atol=1e-5
    )


def test_layers_start_different():
    query = (
        Transformer(layers=2, vocabulary=61).build().init(jax.random.key(0))["body"]["0"]["mixer"]["query"]
    )
    assert np.abs(query[0] - query[1]).max() > 0.01


def test_a_model_without_roles_decays_its_matrices():
    got = plain_roles({"table": jnp.zeros((3, 2)), "bias": jnp.zeros(3)})
    assert got["table"].decay and not got["bias"].decay and got["table"].axes == (None, None)
