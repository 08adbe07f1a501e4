"""Presets have the published sizes."""

import math

import jax
import pytest

from llm_jax.config import UserError, check
from llm_jax.models import ModelConfig
from llm_jax.models.presets import PRESETS

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
