"""What a transformer does whatever its options: sees no future, keeps documents apart, trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import parameters

from llm_jax.config import UserError, check, override
from llm_jax.models import Layout
from llm_jax.models.experts import Experts
from llm_jax.models.positions import Learned, Linear, NoPositions, Rotary, Sinusoidal
from llm_jax.models.transformer import Attending, LayerNorm, RMSNorm, Transformer
from llm_jax.sharding import MeshConfig, batch_sharding, make_mesh

TINY = Transformer(layers=1, width=16, heads=4, vocabulary=31)
OPTIONS = {
    "learned positions": {"positions": Learned(12)},
    "sinusoidal positions": {"positions": Sinusoidal()},
    "no positions": {"positions": NoPositions()},
    "another theta": {"positions": Rotary(100.0)},
    "layer norm": {"norm": LayerNorm()},
    "post norm": {"norm_position": "post"},
    "gelu": {"activation": "gelu"},
    "geglu": {"activation": "geglu"},
    "relu squared": {"activation": "relu2"},
    "grouped queries": {"kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "wide heads": {"head_width": 6},
    "wide mlp": {"mlp_width": 50},
    "normed queries and keys": {"qk_norm": True},
    "untied": {"tied": False},
    "soft-cap": {"softcap": 0.1},
    "window": {"windows": (3,)},
    "bfloat16": {"dtype": "bfloat16"},
    "norms behind": {"norm_position": "output"},
    "norms around": {"norm_position": "sandwich"},
    "norms over all heads": {"qk_norm": True, "attention": Attending(norm_over="heads")},
    "a scale of scores": {"attention": Attending(scale=0.1)},
    "capped scores": {"attention": Attending(softcap=0.01)},
    "biases on q, k, v": {"attention": Attending(bias="qkv")},
    "a block without positions": {"rotations": (None,)},
    "stretched positions": {"positions": Rotary(stretch=Linear(3.0))},
    "multiplied embeddings": {"multiplier": 4.0},
    "experts": {"experts": Experts(3)},
}
# Every option at least once.
MODELS = {
    "default": {},
    "gpt2": {"positions": Learned(12), "norm": LayerNorm(), "activation": "gelu", "bias": True},
    "post": {"positions": Sinusoidal(), "norm_position": "post", "activation": "geglu", "kv_heads": 1},
    "local": {"positions": NoPositions(), "windows": (3, None), "layers": 3, "qk_norm": True, "tied": False},
    "gemma": {
        "norm": RMSNorm(gain=True),
        "norm_position": "sandwich",
        "qk_norm": True,
        "windows": (3, None),
        "rotations": (Rotary(100.0), Rotary()),
        "layers": 3,
        "multiplier": 4.0,
        "attention": Attending(scale=0.3, softcap=2.0),
    },
    "olmoe": {
        "qk_norm": True,
        "norm_position": "output",
        "attention": Attending(norm_over="heads", bias="qkv"),
        "experts": Experts(5, 2, 12, renormalise=False, pattern=(True, False)),
        "layers": 2,
    },
    "low": {"activation": "relu2", "kv_heads": 2, "head_width": 6, "softcap": 0.3, "dtype": "bfloat16"},
}
each_model = pytest.mark.parametrize("name", MODELS)
BATCH = {
    "tokens": jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocabulary),
    "segments": jnp.array([[0] * 5 + [1] * 7, [0] * 12]),
    "positions": jnp.array([[*range(5), *range(7)], [*range(12)]]),
}


def build(layout=Layout(), **fields):
    """A tiny model and its parameters."""
    model = dataclasses.replace(TINY, **fields).build(layout)
    return model, parameters(model)


@functools.cache
def logits_by_name(name):
    """The logits of a model as a function of a batch, compiled once for all tests."""
    model, params = build(**MODELS[name])
    return functools.partial(logits_of(model), params)


def logits_of(model):
    return jax.jit(lambda p, batch, key=None: model.unembed(p, model.apply(p, batch, key).hidden))


def loss_of(model):
    def loss(params, batch):
        logits = model.unembed(params, model.apply(params, batch, None).hidden)
        next_tokens = jnp.roll(batch["tokens"], -1, axis=1)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), next_tokens[..., None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))


@each_model
def test_no_position_depends_on_a_later_one(name):
    changed = BATCH | {"tokens": BATCH["tokens"].at[:, 8].add(1) % TINY.vocabulary}
    moved = np.abs(logits_by_name(name)(BATCH) - logits_by_name(name)(changed)).max(axis=(0, 2))
    assert (moved[:8] == 0).all() and moved[8] > 1e-4


@each_model
def test_a_changed_first_document_does_not_move_the_second(name):
    changed = BATCH | {"tokens": BATCH["tokens"].at[0, :5].add(7) % TINY.vocabulary}
    moved = np.abs(logits_by_name(name)(BATCH) - logits_by_name(name)(changed)).max(axis=-1)
    assert (moved[0, 5:] == 0).all() and (moved[0, :5] > 0).all()


def test_a_packed_document_gets_the_logits_it_has_alone():
    model, params = build(**MODELS["local"])
    alone = logits_of(model)(params, {"tokens": BATCH["tokens"][:1, 5:]})
    np.testing.assert_allclose(logits_by_name("local")(BATCH)[:1, 5:], alone, atol=1e-5)


def seen_from(position, **fields):
    """For each position, whether the hidden state at `position` has a gradient with respect to it."""
    model, params = build(positions=Learned(12), **fields)
    one = lambda p: model.apply(p, {"tokens": BATCH["tokens"]}, None).hidden[0, position, 3]  # noqa: E731
    return (np.abs(jax.jit(jax.grad(one))(params)["embed"]["position"]).sum(-1) > 0).tolist()


def test_the_gradient_with_respect_to_a_future_position_is_zero():
    assert seen_from(7) == [True] * 8 + [False] * 4


def test_a_window_reaches_as_far_as_layers_carry_it_and_no_further():
    reach = 2 * (3 - 1)
    assert seen_from(9, layers=2, windows=(3,)) == [False] * (9 - reach) + [True] * (reach + 1) + [False] * 2


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_each_option_changes_the_logits(fields):
    model, params = build(Layout(attention="reference"), **fields)  # quicker where nothing is compiled as one
    logits = model.unembed(params, model.apply(params, BATCH, None).hidden)
    assert jnp.isfinite(logits).all()
    assert np.abs(logits - logits_by_name("default")(BATCH)).max() > 1e-3


@functools.cache
def step_of(name, layout):
    """(parameters, the compiled loss and gradient, what they are there)."""
    model, params = build(layout, **MODELS[name])
    step = loss_of(model)
    return params, step, step(params, BATCH)


@each_model
def test_every_parameter_trains(name):
    params, step, (loss, gradient) = step_of(name, Layout(unroll=True))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        # Without rotary positions a key's bias adds the same to all scores of a query.
        needed = 0 if path[-1].key != "key_bias" else -1
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > needed, path
    lower, _ = step(jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), BATCH)
    assert lower < loss


@pytest.mark.parametrize(("unroll", "remat"), [(False, "none"), (True, "full"), (False, "dots")])
def test_scan_and_rematerialisation_compute_the_same_values_and_gradients(unroll, remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        step_of("local", Layout(unroll=unroll, remat=remat))[2],  # a pattern of 2, and a tail
        step_of("local", Layout(unroll=True))[2],
    )


def test_rematerialisation_keeps_less():
    def kept(remat):
        model, params = build(Layout(remat=remat))
        _, backward = jax.vjp(lambda p: model.apply(p, BATCH, None).hidden, params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("full") < kept("dots") < kept("none")


def test_bfloat16_is_the_compute_dtype_and_parameters_logits_and_gradients_are_float32():
    model, params = build(dtype="bfloat16")
    hidden = model.apply(params, BATCH, None).hidden
    assert hidden.dtype == jnp.bfloat16
    assert model.unembed(params, hidden).dtype == jnp.float32
    _, gradient = loss_of(model)(params, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    exact, _ = build()
    exact_logits = logits_of(exact)(params, BATCH)
    error = np.abs(logits_of(model)(params, BATCH) - exact_logits).max() / np.abs(exact_logits).max()
    assert 0 < error < 0.03


def test_the_soft_cap_bends_logits_as_a_hyperbolic_tangent():
    capped, params = build(softcap=0.3)
    free, _ = build()
    hidden = capped.apply(params, BATCH, None).hidden
    expected = 0.3 * np.tanh(free.unembed(params, hidden) / 0.3)
    np.testing.assert_allclose(capped.unembed(params, hidden), expected, atol=1e-6)


def test_chunks_of_tokens_unembed_to_the_same_logits_from_the_subtree_alone():
    for tied in (True, False):
        model, params = build(tied=tied, positions=Learned(12))
        hidden = model.apply(params, BATCH, None).hidden
        subtree = model.unembed_params(params)
        assert len(jax.tree.leaves(subtree)) == 1
        chunk = model.unembed(subtree, hidden.reshape(-1, 16)[3:8])
        np.testing.assert_allclose(
            chunk, model.unembed(params, hidden).reshape(-1, 31)[3:8], rtol=1e-5, atol=1e-6
        )


def test_dropout_follows_its_key_and_is_off_without_one():
    model, params = build(dropout=0.5, layers=2)
    still, _ = build(layers=2)
    logits = logits_of(model)
    np.testing.assert_array_equal(logits(params, BATCH), logits_of(still)(params, BATCH))
    first, again, other = (logits(params, BATCH, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    scanned, _ = build(Layout(unroll=False), dropout=0.5, layers=2)
    np.testing.assert_allclose(logits_of(scanned)(params, BATCH, jax.random.key(0)), first, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"layers": 2}),
        ({"data": 1, "sequence": 2, "expert": 2, "tensor": 2}, {"layers": 1, "experts": Experts(4)}),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_computes(sizes, options):
    model, params = build(vocabulary=32, kv_heads=2, tied=False, **options)
    batch = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), BATCH)
    expected = loss_of(model)(params, batch)
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        got = loss_of(model)(params, jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"heads": "5"}, "heads=5 does not divide model.width=16; 4 does"),
        ({"kv_heads": "3"}, "kv_heads=3 does not divide model.heads=4"),
        ({"head_width": "3"}, "a head of 3 can.t be rotary"),
        ({"width": "0"}, "width=0 must be at least 1"),
        ({"windows": "()"}, "windows="),
        ({"windows": "0,none"}, "at least 1"),
        ({"dropout": "1"}, "dropout=1.0 must be"),
        ({"softcap": "0"}, "softcap=0.0 must be positive"),
        ({"positions.theta": "0"}, "theta=0.0 must be positive"),
        ({"positions": "learned", "positions.length": "0"}, "positions.length=0"),
        ({"norm.epsilon": "0"}, "epsilon=0.0 must be positive"),
        ({"positions": "sinusoidal", "width": "17", "heads": "1"}, "must be even for sinusoidal"),
        ({"activation": "gelo"}, "one of gelu"),
        ({"norm": "batch"}, "no normalisation 'batch'"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(flags, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")) as error:
        config = TINY
        for path, text in flags.items():
            config = override(config, path, text)
        check(config, "config.model")
    assert "\n" not in str(error.value)


@dataclasses.dataclass
class FakeData:
    vocabulary: int = 40
    sequence_length: int = 20


def test_the_vocabulary_comes_from_the_data_and_must_hold_it():
    assert dataclasses.replace(TINY, vocabulary=None).resolve(FakeData()).vocabulary == 40
    assert dataclasses.replace(TINY, vocabulary=64).resolve(FakeData()).vocabulary == 64
    with pytest.raises(UserError, match="vocabulary=31 is smaller than the data's 40"):
        TINY.resolve(FakeData())
    with pytest.raises(UserError, match=r"positions\.length=16 is shorter than sequences of 20"):
        Transformer(positions=Learned(16)).resolve(FakeData())
    with pytest.raises(UserError, match="vocabulary is not set"):
        Transformer().build()
