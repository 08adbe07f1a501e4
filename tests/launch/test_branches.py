"""Sweeps whose runs share trunks: launched in order, whatever happens to a trunk or a branch."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_local import (
    bits,
    changed,
    plan_of,
    trained,
    trained_though_killed,
    wait_for,
    where_workers_find_things,
)

from launch import sweep
from llm_jax import config, manifest, records
from llm_jax.schedules import WSD
from llm_jax.train import train

__all__ = ["bits", "where_workers_find_things"]


@pytest.fixture
def wsd(bits):
    """wsd(steps, slow) -> a run on bits with 10 steps of warm-up, the last fifth of its steps a decay."""
    base = config.replace(bits.get_config("small"), "optimizer.schedule", WSD(warmup_steps=10))
    base = config.replace(base, "execution.checkpoint.every_steps", 0)

    def run(steps, slow=0.0, **fields):
        made = dataclasses.replace(base, tokens=16 * steps, name=f"{steps}-steps", **fields)
        return config.replace(made, "data.seconds", slow)

    return run


def losses(folder):
    return records.metrics(folder)["loss"].to_numpy()


def result(item):
    return records.load_run(item.folder)["result"]


# ---- plans ----


def test_a_plan_finds_its_trunks_and_says_what_they_save(wsd, tmp_path):
    plan = plan_of(tmp_path, wsd(50), wsd(100), wsd(25), wsd(100, seed=1))
    small, trunk, _, alone = plan.sweep
    assert [(item.trunk, item.from_step) for item in plan.sweep] == [
        (trunk, 41),
        (None, 0),
        (trunk, 21),
        (None, 0),
    ]
    # The end of its own constant part too, for longer runs to come.
    assert trunk.run.execution.checkpoint.keep_steps == (21, 41, 81)
    assert alone.run.execution.checkpoint.keep_steps == ()
    assert small.price == pytest.approx(small.flops * 9 / 50)
    assert sum(item.price for item in plan.sweep) == pytest.approx(trunk.flops * 2.13)
    text = sweep.summary(plan)
    assert "23% saved" in text
    assert "trunk 100-steps" in text and "branches from steps 21 to 25, 41 to 50" in text
    assert [item.identity for item in plan.sweep] == [
        run.identity() for run in (wsd(50), wsd(100), wsd(25), wsd(100, seed=1))
    ]


def test_a_hold_out_may_start_from_a_run_of_the_sweep_and_never_the_other_way(wsd, tmp_path):
    plan = plan_of(tmp_path, wsd(50), holdout=lambda base: [wsd(100)], forecast=None)
    assert plan.sweep[0].trunk is None
    assert (plan.holdout[0].trunk, plan.holdout[0].from_step) == (plan.sweep[0], 41)


def test_runs_of_which_none_shares_a_start_have_no_line_about_it(bits, tmp_path):
    run = bits.get_config("small")
    assert "trunk" not in sweep.summary(
        plan_of(tmp_path, run, dataclasses.replace(run, tokens=2 * run.tokens))
    )


# ---- launches ----


def test_a_branch_is_launched_from_its_trunk_and_computes_what_the_unbroken_run_does(wsd, tmp_path, capfd):
    plan = plan_of(tmp_path / "shared", wsd(100), wsd(50))
    trunk, branch = plan.sweep
    assert trained(plan, workers=2) == {}
    assert (result(branch)["steps_shared"], result(branch)["trunk"]) == (41, trunk.identity)
    assert "41 of 50 steps were its trunk's" in capfd.readouterr().err
    train(wsd(50), tmp_path / "unbroken")
    np.testing.assert_array_equal(losses(branch.folder), losses(tmp_path / "unbroken"))

    # Extended, a sweep goes on from the old trunk: where its decay began, or from a checkpoint that stands.
    extended = plan_of(tmp_path / "shared", *(wsd(steps) for steps in (200, 150, 100, 50)))
    longest, longer, *old = extended.sweep
    assert (longest.trunk.identity, longest.from_step) == (trunk.identity, 81)
    assert (longer.trunk, longer.from_step) == (longest, 121)
    assert [(item.trunk, item.from_step) for item in old] == [(None, 0), (None, 41)]


def test_a_branch_waits_for_a_checkpoint_of_its_trunk_and_for_nothing_else(wsd, tmp_path):
    trunk, branch = plan_of(tmp_path, wsd(100), wsd(50)).sweep
    seen = []

    def hook(step, params):
        if step > 41:
            wait_for(lambda: branch.ready)
        seen.append((step, branch.ready, trunk.status))
        return {}

    assert not branch.ready
    train(config.replace(trunk.run, "execution.evaluate_every_steps", 30), trunk.folder, [hook])
    assert seen[:2] == [(30, False, "running"), (60, True, "running")]
    shutil.rmtree(trunk.folder / "checkpoints")
    assert branch.ready  # no checkpoint will come any more
    assert [item.trunk for item in plan_of(tmp_path, wsd(100), wsd(50)).sweep] == [None, None]


def test_a_killed_trunk_continues_and_its_branch_waits_for_it(wsd, tmp_path):
    run = config.replace(wsd(100, slow=0.02), "execution.checkpoint.every_steps", 10)
    short = config.replace(wsd(50, slow=0.02), "execution.checkpoint.every_steps", 10)
    plan = plan_of(tmp_path / "killed", run, short)
    trunk, branch = plan.sweep
    assert trained_though_killed(plan, lambda: manifest.steps(trunk.folder / "checkpoints")) == {}
    assert len(records.starts(trunk.folder)) == 2
    assert result(branch)["steps_shared"] == 41
    train(short, tmp_path / "unbroken")
    np.testing.assert_array_equal(losses(branch.folder), losses(tmp_path / "unbroken"))


def test_a_trunk_that_fails_after_the_checkpoint_serves_its_branch_all_the_same(wsd, tmp_path):
    deadly = {"trouble": "kill", "trouble_at": 60, "seconds": 0.01}  # a save is complete long before
    plan = plan_of(tmp_path, changed(wsd(100), **deadly), changed(wsd(50), **deadly))
    trunk, branch = plan.sweep
    assert list(trained(plan)) == [trunk]
    assert (trunk.status, branch.status, result(branch)["steps_shared"]) == ("failed", "done", 41)


def test_a_trunk_that_can_not_be_trained_does_not_lose_its_branch(wsd, tmp_path, capfd):
    plan = plan_of(tmp_path / "shared", wsd(100), wsd(50))
    trunk, branch = plan.sweep
    foreign = {"identity": "f" * 12, "schema": 1, "scientific": {}, "config": {}}
    trunk.folder.mkdir(parents=True)
    (trunk.folder / "config.json").write_text(json.dumps(foreign))
    failures = trained(plan)
    assert list(failures) == [trunk] and "belongs to run ffff" in failures[trunk]
    assert (branch.status, result(branch)["steps_shared"]) == ("done", 0)
    assert "100-steps left it no checkpoint, all steps are its own" in capfd.readouterr().err
