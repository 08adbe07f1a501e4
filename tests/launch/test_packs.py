"""Packs of a sweep: which runs go together, and that nothing is lost by it, whatever happens."""

import dataclasses

import hasty
import numpy as np
import pytest
from test_local import BITS, ROOT, changed, plan_of, trained, trained_though_killed

from launch import packs
from launch.processes import Share, one_core_each
from llm_jax import config, experiment_file, records
from llm_jax.config import UserError
from llm_jax.pack import pack
from llm_jax.program import program
from llm_jax.run import EarlyStopping
from llm_jax.schedules import WSD
from llm_jax.train import train


@pytest.fixture(scope="module")
def run():
    return experiment_file.load_experiment(str(BITS))[0].get_config("small")


@pytest.fixture(autouse=True)
def where_workers_find_things(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    monkeypatch.setenv("XLA_FLAGS", hasty.flags(devices=1))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(packs, "LEAST_STEPS", 0)  # these runs are short


def seeds(run, count):
    return [dataclasses.replace(run, seed=seed) for seed in range(count)]


def widths(runs, tmp_path, *how):
    return sorted(len(pack.runs) for pack in packs.packed(plan_of(tmp_path, *runs).runs, *how))


def losses(folder):
    return records.metrics(folder)["loss"].to_numpy()


def test_runs_with_one_program_are_packed_a_part_for_each_worker(run, tmp_path):
    assert widths(seeds(run, 6), tmp_path, 1, None) == [6]
    assert widths(seeds(run, 7), tmp_path, 2, None) == [3, 4]
    assert widths(seeds(run, 7), tmp_path, 2, 3) == [1, 3, 3]
    assert widths(seeds(run, 7), tmp_path, 1, 1) == [1] * 7
    wide = [config.replace(one, "model.width", 32) for one in seeds(run, 2)]
    assert widths([*seeds(run, 3), *wide, changed(run, batch_size=8)], tmp_path, 1, None) == [1, 2, 3]


def test_a_pack_is_of_runs_that_end_at_about_the_same_time(run, tmp_path):
    lengths = [dataclasses.replace(run, tokens=16 * steps) for steps in (100, 95, 80, 74, 60, 30)]
    plan = plan_of(tmp_path, *lengths)
    together = [[one.run.steps for one in pack.runs] for pack in packs.packed(plan.runs, 1, None)]
    assert together == [[100, 95, 80], [74, 60], [30]]


def test_a_pack_that_would_not_earn_back_its_compilation_is_none_unless_asked_for(run, tmp_path, monkeypatch):
    plan = plan_of(tmp_path, *seeds(run, 4))
    monkeypatch.setattr(packs, "LEAST_STEPS", 4 * run.steps)
    assert len(packs.packed(plan.runs, 1, None)) == 1
    monkeypatch.setattr(packs, "LEAST_STEPS", 4 * run.steps + 1)
    alone = packs.packed(plan.runs, 1, None)
    assert len(alone) == 4 and "with --workers=1 no pack has" in packs.summary(alone, 1, None)
    assert packs.summary([], 1, None) == ""
    assert len(packs.packed(plan.runs, 1, 4)) == 1


def test_workers_of_a_core_each_have_nothing_that_a_pack_could_fill(run, tmp_path):
    assert one_core_each([Share(frozenset({0})), Share(frozenset({1}))])
    for parts in (
        [Share()],
        [Share(frozenset({0, 1}))],
        [Share(environment=(("CUDA_VISIBLE_DEVICES", "0"),))],
    ):
        assert not one_core_each(parts)
    alone = packs.packed(plan_of(tmp_path, *seeds(run, 2)).runs, 2, 1)
    assert packs.summary(alone, 2, 1, "a core each") == "packs: none (a core each)"


def test_the_plan_says_how_it_is_packed_and_why(run, tmp_path):
    plan = plan_of(tmp_path, *seeds(run, 5))
    line = packs.summary(packs.packed(plan.runs, 2, None), 2, None)
    assert line.startswith("packs of 3, 2 runs, 0 runs alone (runs with one program") and "memory" in line
    assert packs.summary(packs.packed(plan.runs, 2, 4), 2, 4) == "packs of 4 runs, 1 runs alone (--pack=4)"
    assert packs.summary(packs.packed(plan.runs, 2, 1), 2, 1) == "packs: none (--pack=off)"
    others = plan_of(tmp_path / "others", *(config.replace(run, "model.width", 8 * n) for n in (1, 2)))
    assert "no runs with one program" in packs.summary(packs.packed(others.runs, 2, None), 2, None)


@pytest.mark.parametrize(("text", "width"), [("auto", None), ("off", 1), ("12", 12)])
def test_what_the_flag_means(text, width):
    assert packs.width_of(text) == width


@pytest.mark.parametrize("text", ["on", "0", "-3", "2.5", "²"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match=f"--pack={text}: it is auto, off, or the most members"):
        packs.width_of(text)


def test_packed_runs_end_as_they_would_alone_even_if_their_worker_is_killed(run, tmp_path):
    slow = config.replace(run, "data.seconds", 0.02)
    plan = plan_of(tmp_path / "packed", *seeds(slow, 3))
    checkpoints = [one.folder / "checkpoints" for one in plan.runs]

    saved = lambda: all(any(folder.glob("*.json")) for folder in checkpoints)  # noqa: E731
    assert trained_though_killed(plan, saved, width=None) == {}
    for one in plan.runs:
        starts = records.starts(one.folder)
        assert [start["resume_at"] > 0 for start in starts] == [False, True]
        assert {start["facts"]["layout"]["members"] for start in starts} == {3}
        train(one.run, tmp_path / "alone" / one.identity)
        np.testing.assert_allclose(losses(one.folder), losses(tmp_path / "alone" / one.identity), atol=1e-5)


def test_of_a_pack_that_is_refused_each_run_is_tried_alone(run, tmp_path):
    plan = plan_of(tmp_path, *seeds(run, 3))
    plan.runs[1].folder.mkdir(parents=True)
    train(dataclasses.replace(run, seed=9), plan.runs[1].folder)
    (plan.runs[1].folder / "result.json").unlink()  # another run's, which was never finished
    failures = trained(plan, width=None)
    assert list(failures) == [plan.runs[1]] and "belongs to run" in failures[plan.runs[1]]
    assert [plan.runs[number].status for number in (0, 2)] == ["done", "done"]


def test_a_member_that_kills_its_process_takes_no_other_with_it(run, tmp_path):
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "import os, signal\nfrom llm_jax import experiment_file\n"
        f"bits, _ = experiment_file.load_experiment({str(BITS)!r})\n"
        "SCALES, get_config = bits.SCALES, bits.get_config\n"
        "def hooks(run):\n"
        "    return [lambda step, params: os.kill(os.getpid(), signal.SIGKILL)] if run.seed == 1 else []\n"
    )
    plan = plan_of(tmp_path, *seeds(config.replace(run, "execution.evaluate_every_steps", 5), 3))
    failures = trained(plan, width=None, experiment=deadly)
    assert list(failures) == [plan.runs[1]] and "killed by SIGKILL" in failures[plan.runs[1]]
    assert [plan.runs[number].status for number in (0, 2)] == ["done", "done"]


def test_branches_of_trunks_of_other_rates_are_packed(run, tmp_path):
    wsd = config.replace(run, "optimizer.schedule", WSD(decay_fraction=0.25, warmup_steps=2))
    rates = [config.replace(wsd, "optimizer.learning_rate", rate) for rate in (1e-3, 2e-3, 4e-3)]
    runs = [dataclasses.replace(one, tokens=16 * steps) for one in rates for steps in (40, 60, 100)]
    plan = plan_of(tmp_path, *runs)
    sizes = [
        (len(pack.runs), {one.from_step for one in pack.runs}) for pack in packs.packed(plan.runs, 1, None)
    ]
    assert sorted(sizes, key=str) == [(3, {0}), (3, {31}), (3, {46})]
    assert trained(plan, width=None) == {}
    results = [records.load_run(one.folder)["result"] for one in plan.runs]
    assert {result["members"] for result in results} == {3}
    assert sorted(result["steps_shared"] for result in results) == [0] * 3 + [31] * 3 + [46] * 3


def test_the_plan_says_where_early_stopping_stops_nobody(run, tmp_path):
    rule = config.replace(run, "execution.stopping", EarlyStopping(margin=0.1))
    plan = plan_of(tmp_path, *seeds(rule, 3))
    assert "can't stop 3 runs that train alone" in packs.unstopped(packs.packed(plan.runs, 1, 1))
    assert packs.unstopped(packs.packed(plan.runs, 1, None)) == ""


def test_a_worker_trains_as_many_as_fit_and_hands_back_the_rest(run, tmp_path):
    needed = program(*pack(config.replace(run, "execution.mesh.data", 1), 3, own_rows=True)).memory_bytes
    small = tmp_path / "small.py"
    small.write_text(
        f"import os\nfrom llm_jax import experiment_file, facts\nfrom llm_jax.kernels import memory\n"
        f"bits, _ = experiment_file.load_experiment({str(BITS)!r})\n"
        f"SCALES, get_config = bits.SCALES, bits.get_config\n"
        f"memory.room = lambda mesh: {needed} * os.cpu_count() / facts.cores()\n"
    )
    plan = plan_of(tmp_path, *seeds(run, 5))
    assert trained(plan, width=None, experiment=small) == {}
    members = [records.load_run(one.folder)["result"]["members"] for one in plan.runs]
    assert sorted(members) == [2, 2, 3, 3, 3]
