"""Presets have the published sizes, and a ladder's rungs are one shape."""

import math

import jax
import pytest

from llm_jax.config import UserError, check
from llm_jax.models import ModelConfig
from llm_jax.models.presets import PRESETS, ladder

PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    config = ModelConfig.parse(name)
    check(config)
    params = jax.eval_shape(config.build().init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no model 'llama3-8'; did you mean 'llama3-8b'"):
        ModelConfig.parse("llama3-8")
    assert ModelConfig.parse("transformer").kind == "transformer"


def test_rungs_of_a_ladder_are_valid_and_grow_in_one_proportion():
    rungs = [ladder(width) for width in range(32, 2049, 32)]
    for rung in rungs:
        check(rung)
        assert rung.size_of_head * rung.heads == rung.width
    assert {rung.width / rung.layers for rung in rungs[1:]} == {32}
    assert {rung.size_of_head for rung in rungs[:15]} == {32}
    assert ladder(256, aspect=64, heads=2, bias=True).heads == 2
