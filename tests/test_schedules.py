"""Schedules: where they rise, peak and end, against optax's own where it has one."""

import dataclasses

import numpy as np
import optax
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.schedules import WSD, Constant, Cosine, Linear, Schedule

STEPS = 200
ALL = [Constant(0.1), Linear(0.1, 0.05), Cosine(0.1, 0.05), WSD(0.1, 0.25, "linear", 0.05), WSD(0.1)]


@pytest.mark.parametrize("schedule", [*ALL, Cosine(warmup_steps=20)], ids=str)
def test_warm_up_rises_in_equal_parts_to_a_peak_of_one_and_never_starts_at_zero(schedule):
    table = schedule.table(STEPS)
    np.testing.assert_allclose(np.diff(table[:21], prepend=0.0), 1 / 21, rtol=1e-12)
    assert table[20] == table.max() == 1.0


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Cosine(0.1, 0.05), optax.cosine_decay_schedule(1.0, 180, 0.05)),
        (Linear(0.1, 0.05), optax.linear_schedule(1.0, 0.05, 180)),
        (
            WSD(0.1, 0.25, "linear", 0.05),
            optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.05, 50)], [130]),
        ),
        (
            WSD(0.1, 0.25, "cosine", 0.05),
            optax.join_schedules(
                [optax.constant_schedule(1.0), optax.cosine_decay_schedule(1.0, 50, 0.05)], [130]
            ),
        ),
    ],
    ids=["cosine", "linear", "wsd linear", "wsd cosine"],
)
def test_decays_after_the_warm_up_are_optax_s(schedule, reference):
    expected = [float(reference(step - 20)) for step in range(20, STEPS)]
    np.testing.assert_allclose(schedule.table(STEPS)[20:], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [s for s in ALL if not isinstance(s, Constant)], ids=str)
@pytest.mark.parametrize("steps", [7, 200, 1001])
def test_the_end_value_belongs_to_the_step_after_the_last(schedule, steps):
    to_zero = dataclasses.replace(schedule, final_fraction=0.0).table(steps)
    assert (to_zero > 0).all(), "a step at rate 0 is wasted"
    # The tail is a curve from 1 at its start to 0 at `steps`; its last value tells how far the end is.
    start = np.flatnonzero(to_zero == 1.0)[-1]
    u = (steps - 1 - start) / (steps - start)
    shape = getattr(schedule, "shape", schedule.kind)
    last = {"linear": 1 - u, "cosine": (1 + np.cos(np.pi * u)) / 2, "one_minus_sqrt": 1 - u**0.5}[shape]
    np.testing.assert_allclose(to_zero[-1], last, rtol=1e-9)


def test_one_minus_sqrt_falls_as_haegele_et_al_define_it():
    tail = WSD(0.0, 0.5, "one_minus_sqrt").table(8)[4:]
    np.testing.assert_allclose(tail, [1, 1 - 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])


def test_wsd_is_its_trunk_until_the_decay_starts():
    trunk, branch = Constant(0.1).table(STEPS), WSD(0.1, 0.25).table(STEPS)
    assert (trunk[:151] == branch[:151]).all() and (trunk[151:] > branch[151:]).all()


@pytest.mark.parametrize("schedule", ALL, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_positive_rates(schedule, steps):
    table = schedule.table(steps)
    assert table.shape == (steps,) and (table > 0).all() and (table <= 1).all()


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Cosine(warmup_fraction=1.5), "warmup_fraction is 1.5"),
        (Cosine(final_fraction=-0.1), "final_fraction is -0.1"),
        (Linear(warmup_fraction=float("nan")), "warmup_fraction is nan"),
        (WSD(decay_fraction=2.0), "decay_fraction is 2.0"),
        (WSD(warmup_fraction=0.6, decay_fraction=0.6), "together exceed the run"),
        (WSD(shape="cubic"), "one of linear, cosine, one_minus_sqrt"),
        (Cosine(warmup_steps=-1), "warmup_steps is -1"),
    ],
    ids=str,
)
def test_schedules_that_make_no_sense_are_refused(schedule, words):
    with pytest.raises(UserError, match=words):
        config.check(schedule)


def test_a_warm_up_in_steps_is_as_long_in_runs_of_any_length_and_must_end_before_the_run():
    short, long = (WSD(warmup_steps=20).table(steps) for steps in (100, 1000))
    assert (short[:81] == long[:81]).all() and short[81] < long[81]
    WSD(warmup_steps=20).check_length(21)
    with pytest.raises(UserError, match="leaves nothing of the 20 steps"):
        WSD(warmup_steps=20).check_length(20)


def test_schedules_are_chosen_by_name():
    assert {"constant", "linear", "cosine", "wsd"} <= Schedule.members.keys()
    assert Schedule.parse("wsd") == WSD()
