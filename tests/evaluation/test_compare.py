"""Two models on the same items: what lies between them, and how sure that is."""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.evaluation.compare import difference, paired
from llm_jax.evaluation.probes import Probing
from llm_jax.evaluation.scores import evaluate
from llm_jax.evaluation.tasks import Format

EXPERIMENT = pathlib.Path(__file__).parents[2] / "experiments" / "base_vs_instruct.py"


def test_an_interval_holds_the_true_difference_as_often_as_it_says():
    """Items that both find hard or easy."""
    random, held = np.random.default_rng(0), 0
    for trial in range(200):
        ease = random.uniform(0, 0.8, 80)
        base, instruct = random.random(80) < ease, random.random(80) < ease + 0.1
        pairs = [((float(a), 1.0), (float(b), 1.0)) for a, b in zip(base, instruct, strict=True)]
        found = difference(pairs, draws=400, seed=trial)
        assert found.difference == pytest.approx(instruct.mean() - base.mean())
        held += found.low <= 0.1 <= found.high

    assert 180 <= held <= 199


def test_a_ratio_s_difference_weighs_items_by_their_size():
    pairs = [((1.0, 1.0), (2.0, 1.0)), ((9.0, 9.0), (9.0, 9.0))]
    found = difference(pairs)
    assert (found.base, found.instruct, found.count) == (1.0, pytest.approx(1.1), 2)
    assert found.low == 0.0 and found.high == pytest.approx(1.0)


def test_equal_answers_differ_by_nothing_and_other_items_are_refused(evaluator):
    task = Probing(name="arithmetic", count=2)
    one = evaluate(evaluator, "arithmetic", task, None, Format())
    assert all(pair[2:5] == (0.0, 0.0, 0.0) for pair in paired(one, one).values())
    with pytest.raises(UserError, match="arithmetic: the two models were asked about other items"):
        paired(one, dataclasses.replace(one, items=one.items[1:], scores=one.scores[1:]))


def test_an_experiment_with_one_checkpoint_says_what_it_needs(tmp_path):
    spec = importlib.util.spec_from_file_location("base_vs_instruct", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=r"--config.base=PATH --config.instruct=PATH"):
        module.measure(dataclasses.replace(module.get_config("cpu"), base="a"), tmp_path)
