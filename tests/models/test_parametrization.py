"""Parametrisations against the tables of their papers and what others' code gives, and what they promise."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.models.parametrization import CompleteP, MuP, Parametrization, PerLayer, Standard
from llm_jax.models.positions import Learned, Sinusoidal
from llm_jax.models.transformer import LayerNorm, Transformer
from llm_jax.optimizers import SGD, Adafactor, AdamW, Lion, Muon, Optimizer, ScheduleFree
from llm_jax.run import Run

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_multipliers.json").read_text())
WIDTH, BASE = 256, 64
GPT2 = {"positions": Learned(50), "norm": LayerNorm(), "activation": "gelu", "bias": True, "vocabulary": 97}


def model(parametrization, width=WIDTH, **fields):
    return Transformer(
        **{"width": width, "heads": width // 32, "tied": False, "parametrization": parametrization}
        | GPT2
        | fields
    )


def shapes_and_roles(transformer):
    """(where a parameter stands, its name) -> (shape, role)."""
    built = transformer.build()
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    roles = jax.tree.leaves(built.roles(shapes))
    return {(path[0].key, role.name): (leaf, role) for (path, leaf), role in zip(flat, roles, strict=True)}


@pytest.mark.parametrize("steps", ["adam", "sgd"])
def test_mup_multiplies_rate_and_decay_as_the_package_mup_does(steps):
    found = {name: role for (_, name), (_, role) in shapes_and_roles(model(MuP(BASE))).items()}
    for name, expected in PUBLISHED["mup"][steps].items():
        got = found[name].multiplier(steps)
        assert [got.rate, got.decay] == expected, name


def test_mup_starts_the_head_and_scales_logits_as_the_package_mup_does():
    assert MuP(BASE).at(WIDTH, 2, 32).output == PUBLISHED["mup_output_multiplier"]
    ours = {width: model(MuP(BASE), width).build().init(jax.random.key(0)) for width in (64, 256)}
    theirs = PUBLISHED["mup_readout_deviation"]
    ratio = float(ours[256]["head"]["head"].std() / ours[64]["head"]["head"].std())
    assert ratio == pytest.approx(theirs["256"] / theirs["64"], rel=0.03)
    ratio = float(ours[256]["embed"]["embedding"].std() / ours[64]["embed"]["embedding"].std())
    assert ratio == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("alpha", ["1.0", "0.5"])
def test_completep_multiplies_rate_decay_and_epsilon_as_its_authors_code_does(alpha):
    parametrization = CompleteP(BASE, base_layers=2, alpha=float(alpha))
    found = shapes_and_roles(model(parametrization, layers=8))
    for place, expected in PUBLISHED["completep"][alpha].items():
        _, role = found[tuple(place.split("/"))]
        got = role.multiplier("adam")
        assert [got.rate, got.decay * role.decay, got.epsilon] == expected, place
    scaling = parametrization.at(WIDTH, 8, 32)
    assert scaling.residual == PUBLISHED["completep_residual"][alpha]
    assert scaling.output == BASE / WIDTH


# Everett et al. 2024, arXiv:2407.05872: exponents of the rate in the standard parametrisation, {steps:
# {alignment: (embedding, hidden, readout)}}.
EVERETT = {
    "adam": {"full": (0, -1, -1), "none": (0, -0.5, -0.5)},
    "sgd": {"full": (0.5, -0.5, -1), "none": (0.5, 0, -0.5)},
}


@pytest.mark.parametrize("alignment", ["full", "none"])
@pytest.mark.parametrize("steps", EVERETT)
def test_per_layer_rates_have_the_paper_s_exponents(steps, alignment):
    found = {
        name: role for (_, name), (_, role) in shapes_and_roles(model(PerLayer(BASE, alignment))).items()
    }
    for name, exponent in zip(("embedding", "query", "head"), EVERETT[steps][alignment], strict=True):
        got = found[name].multiplier(steps)
        assert got.rate == pytest.approx((WIDTH / BASE) ** exponent), name
        assert got.rate * got.decay == 1


BASES = [MuP(32, 8), CompleteP(32, 8, 3), CompleteP(32, 8, 3, 0.5), PerLayer(32)]


@pytest.mark.parametrize("parametrization", BASES, ids=lambda p: p.kind)
def test_at_its_base_shape_every_parametrisation_is_the_standard_one(parametrization):
    shape = {"width": 32, "heads": 4, "layers": 3}
    ours, standard = model(parametrization, **shape), model(Standard(), **shape)
    assert {**parametrization.at(32, 3, 8)._asdict(), "init": {}, "outer": {}, "blocks": {}} == {
        **Standard().at(32, 3, 8)._asdict(), "init": {}, "outer": {}, "blocks": {}
    }  # fmt: skip
    params = [each.build().init(jax.random.key(0)) for each in (ours, standard)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    for _, role in shapes_and_roles(ours).values():
        assert role.multipliers and all(set(of) == {1.0} for of in role.multipliers.values())


def filled(params):
    """Parameters in which no matrix is zero, the blocks' last ones neither."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)


BATCH = {"tokens": jnp.arange(12)[None]}


@pytest.fixture(scope="module")
def standard():
    """A standard model of width 16 and 4 layers, its parameters, and what stands in its layers."""
    built = model(Standard(), 16, heads=2, layers=4).build()
    params = filled(built.init(jax.random.key(0)))
    return built, params, built.activations(params, BATCH)


def test_scores_go_as_one_over_the_head_width_and_logits_as_one_over_m(standard):
    built, params, found = standard
    wide = model(
        MuP(8, 4), 16, heads=2, layers=4
    ).build()  # heads of 8: scores are 2^-1/2 of the standard ones
    steeper = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 2**0.5 if path[-1].key.startswith("query") else leaf, params
    )
    np.testing.assert_allclose(
        wide.apply(steeper, BATCH, None).hidden, built.apply(params, BATCH, None).hidden, atol=1e-4
    )
    assert (
        np.abs(wide.apply(params, BATCH, None).hidden - built.apply(params, BATCH, None).hidden).max() > 1e-2
    )
    np.testing.assert_allclose(
        2 * wide.unembed(params, found["hidden"]), found["logits"], rtol=1e-5, atol=1e-5
    )


def test_completep_divides_what_a_branch_adds_by_the_depth(standard):
    _, params, plain = standard
    deep = model(CompleteP(16, 8, 1), 16, heads=2, layers=4).build().activations(params, BATCH)
    np.testing.assert_allclose(deep["mixer"][0], plain["mixer"][0], atol=1e-5)
    for found, depth in ((deep, 4), (plain, 1)):
        before = jnp.concatenate([found["embedding"], found["stream"][:-1]])
        np.testing.assert_allclose(
            found["stream"] - before, (found["mixer"] + found["mlp"]) / depth, atol=1e-4
        )


def test_activations_end_in_what_the_model_gives():
    transformer = model(MuP(8, 4), 16, heads=2, layers=3, windows=(4, None)).build()
    params, batch = filled(transformer.init(jax.random.key(0))), BATCH
    found = transformer.activations(params, batch)
    assert {name: len(layers) for name, layers in found.items()} == {
        "embedding": 1, "mixer": 3, "mlp": 3, "stream": 3, "hidden": 1, "logits": 1
    }  # fmt: skip
    hidden = transformer.apply(params, batch, None).hidden
    np.testing.assert_allclose(found["hidden"][0], hidden, atol=1e-5)
    np.testing.assert_allclose(found["logits"][0], transformer.unembed(params, hidden), atol=1e-5)


# ---- what is refused ----

GOES = {
    "standard": {"adamw", "muon", "lion", "adafactor", "sgd", "schedule_free"},
    "mup": {"adamw", "muon", "lion", "sgd", "schedule_free"},
    "completep": {"adamw", "muon", "lion", "schedule_free"},
    "per_layer": {"adamw", "lion", "sgd", "schedule_free"},
}


@pytest.mark.parametrize("kind", Parametrization.members)
def test_an_optimizer_without_a_rule_is_refused_in_one_line(kind):
    parametrization, goes = Parametrization.members[kind](), set()
    for optimizer in (AdamW(), Muon(), Lion(), Adafactor(), SGD(), ScheduleFree()):
        run = Run(Transformer(tied=False, parametrization=parametrization), optimizer=optimizer)
        try:
            config.check(run)
            goes.add(optimizer.kind)
        except UserError as error:
            words = f"parametrization={kind} has no rule for optimizer={optimizer.kind}; it has one for adamw"
            assert words in str(error)
    assert goes == GOES[kind] and set(Optimizer.members) >= GOES["standard"]


@pytest.mark.parametrize(
    ("transformer", "words"),
    [
        (Transformer(parametrization=PerLayer()), "set model.tied=false"),
        (Transformer(parametrization=MuP(), positions=Sinusoidal()), "no rule for the sqrt"),
        (Transformer(parametrization=CompleteP(), norm_position="post"), "norm_position=pre only"),
        (
            Transformer(parametrization=MuP(base_width=0)),
            "model.parametrization.base_width is 0; it is at least 1",
        ),
        (Transformer(parametrization=CompleteP(alpha=0.0)), "between 0.5 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_without_a_rule_is_refused_in_one_line(transformer, words):
    with pytest.raises(UserError, match=words):
        config.check(transformer)


def test_the_flag_takes_a_parametrisation_and_its_base():
    run = config.override(Run(), "model.parametrization", "completep")
    run = config.override(run, "model.parametrization.base_width", "32")
    assert run.model.parametrization == CompleteP(32)
    assert "parametrization" not in config.scientific(Run(), content=False).get("model", {})
