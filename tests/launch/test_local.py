"""Sweeps launched on this machine: nothing lost, nothing done twice, whatever happens to a process."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from launch import local, order, sweep
from launch.packs import packed
from launch.pool import Pool
from launch.processes import Share, shares
from llm_jax import claims, config, experiment_file, facts, files, records
from llm_jax.command_line import Chosen
from llm_jax.config import UserError
from llm_jax.scaling.forecast import Forecast
from llm_jax.sharding import MeshConfig
from llm_jax.store import store
from llm_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent.parent
BITS = pathlib.Path(__file__).parent / "bits.py"
LONG_SECONDS = 600.0  # what takes so long hangs, on however loaded a machine

OVERRIDES = f"""
import dataclasses
from llm_jax import experiment_file
bits, _ = experiment_file.load_experiment({str(BITS)!r})
SCALES, get_config = bits.SCALES, bits.get_config

def sweep(base):
    rate, model = base.optimizer.learning_rate, dataclasses.replace(base.model, width=16)
    optimizers = [dataclasses.replace(base.optimizer, learning_rate=times * rate) for times in (2, 4)]
    return [dataclasses.replace(base, optimizer=one, model=model, seed=0, name="run") for one in optimizers]
"""


@pytest.fixture(scope="module")
def bits():
    return experiment_file.load_experiment(str(BITS))[0]


@pytest.fixture(autouse=True)
def where_workers_find_things(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    monkeypatch.chdir(ROOT)


def plan_of(folder, *runs, **functions):
    """The plan of an experiment whose sweep() returns `runs`."""
    module = types.SimpleNamespace(__file__=str(BITS), sweep=lambda base: list(runs), **functions)
    return sweep.make_plan(Chosen(module, "small", runs[0], ()), folder)


def trained(plan, workers=1, width=1, experiment=BITS):
    return Pool(packed(plan.runs, workers, width), experiment, [Share()] * workers).run()


def changed(run, **data):
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **data))


def launched(*arguments):
    command = [sys.executable, "-m", "launch.local", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=LONG_SECONDS)
    return process.returncode, out, err


def trained_though_killed(plan, when, **how):
    """As `trained`, but the worker is killed, once, as soon as `when()` is true."""

    def kill():
        wait_for(when)
        children = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
        workers = [int(pid) for file in children for pid in file.read_text().split()]
        for pid in workers:
            if b"launch.worker" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    failures = trained(plan, **how)
    killer.join()
    return failures


def wait_for(condition, process=None):
    """Returns when the condition is true; fails if the process ends before."""
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), (
            "it did not happen"
        )
        time.sleep(0.02)


# ---- plans ----


def test_a_run_that_is_planned_twice_is_done_once(bits, tmp_path):
    run = bits.get_config("small")
    plan = plan_of(tmp_path, run, dataclasses.replace(run, name="again"), dataclasses.replace(run, seed=1))
    assert [item.run.seed for item in plan.runs] == [0, 1]


def test_the_table_has_the_runs_of_the_plan_only(bits, tmp_path):
    ours = dataclasses.replace(bits.get_config("small"), tokens=16 * 5, name="ours")
    theirs = dataclasses.replace(ours, seed=7)
    for run in (ours, theirs):
        train(run, tmp_path / run.identity())
    renamed = dataclasses.replace(ours, name="renamed")
    table = plan_of(tmp_path, renamed).table(plan_of(tmp_path, renamed).runs)
    assert table["name"].tolist() == ["renamed"]
    assert table["seed"].tolist() == [0]


def test_a_run_whose_tokens_another_version_made_joins_no_plan(bits, tmp_path, monkeypatch):
    run = dataclasses.replace(bits.get_config("small"), tokens=16 * 5)
    monkeypatch.setattr(bits.BitSource, "record", {"tokenizer": {"library": "sentencepiece 1.0"}})
    train(run, tmp_path / run.identity())
    assert plan_of(tmp_path, run).runs[0].complete
    monkeypatch.setattr(bits.BitSource, "record", {"tokenizer": {"library": "sentencepiece 1.1"}})
    with pytest.raises(UserError, match=r"its tokens were made by sentencepiece 1\.0"):
        plan_of(tmp_path, run)


def test_a_forecast_is_on_disk_before_its_hold_out_begins(bits, tmp_path):
    small = dataclasses.replace(bits.get_config("small"), tokens=16 * 5)
    large = dataclasses.replace(small, tokens=16 * 20)
    trained_runs, reports = [], []

    def forecast(base, table, run):
        return Forecast(
            1, run.tokens, 1, 0.1, {0.9: (0.0, 1.0)}, 0.1, "a guess", {"formula": "L"}, 1, "", 1, ""
        )

    def engine(runs, planned, before):
        before()
        for item in runs:
            trained_runs.append((item.run.tokens, (item.folder / "forecast.json").exists()))
            train(item.run, item.folder)
        return {}

    plan = plan_of(
        tmp_path,
        small,
        holdout=lambda base: [large],
        forecast=forecast,
        report=lambda base, folder, table, forecasts: reports.append((len(table), len(forecasts))),
    )
    assert order.carry_out(plan, engine) == 0
    assert order.carry_out(plan, engine) == 0
    assert trained_runs == [(small.tokens, False), (large.tokens, True)]
    assert reports == [(2, 1), (2, 1)]


def test_a_hold_out_waits_for_the_whole_sweep(bits, tmp_path):
    run = bits.get_config("small")
    larger = dataclasses.replace(run, tokens=2 * run.tokens)
    asked = []

    def engine(runs, planned, before):
        asked.extend(runs)
        return {item: "it broke" for item in runs}

    plan = plan_of(tmp_path, run, holdout=lambda base: [larger], forecast=lambda base, table, run: None)
    assert order.carry_out(plan, engine) == 1
    assert [item.run for item in asked] == [run]


def test_overrides_that_the_sweep_replaces_are_named_in_the_plan(tmp_path):
    """Each run's rate is made from the base's, so it counts; seed and width are what they are anyway."""
    (tmp_path / "overrides.py").write_text(OVERRIDES)
    module, scale = experiment_file.load_experiment(str(tmp_path / "overrides.py"))
    overrides = [("seed", "3"), ("optimizer.learning_rate", "0.1"), ("model.width", "8"), ("tokens", "160")]
    overrides += [("name", "mine"), ("model.kind", "bits_classifier")]
    base = module.get_config(scale)
    for path, text in overrides:
        base = config.override(base, path, text)
    plan = sweep.make_plan(Chosen(module, scale, base, tuple(overrides)), tmp_path / "runs")
    assert sweep.without_effect(plan) == ["--config.seed=3", "--config.model.width=8"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SCALES = {'a': 1}\ndef get_config(scale): ...", "an experiment defines sweep"),
        ("SCALES = {'a': 1}", "defines get_config"),
        (
            "SCALES = {'a': 1}\ndef get_config(scale): ...\ndef sweep(base): ...\ndef holdout(base): ...",
            "forecast",
        ),
    ],
)
def test_an_experiment_that_lacks_a_part_is_refused(tmp_path, text, message):
    (tmp_path / "lacking.py").write_text(text)
    with pytest.raises(UserError, match=message):
        module, scale = experiment_file.load_experiment(str(tmp_path / "lacking.py"))
        order.check(Chosen(module, scale, None, ()))


@pytest.mark.parametrize("holdout", [[], [(1,)]], ids=["alone", "with a forecast that fails"])
def test_failures_are_said_before_a_report_that_fails_too(bits, tmp_path, capsys, holdout):
    run = bits.get_config("small")

    def unable(*_):
        raise UserError("too few runs for a law")

    def engine(runs, planned, before):
        before()
        return {} if holdout else {item: "it broke" for item in runs}

    parts = {"report": unable}
    if holdout:
        parts |= {"holdout": lambda base: [dataclasses.replace(run, seed=1)], "forecast": unable}
    assert order.carry_out(plan_of(tmp_path, run, **parts), engine) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("report: ")
    assert re.match("forecast: .*; the hold-out waits" if holdout else "failed: .*: it broke", said[-2])


def test_a_hold_out_that_diverged_is_said(bits, tmp_path, capsys, monkeypatch):
    run = bits.get_config("small")
    larger = dataclasses.replace(run, seed=1, name="larger")
    monkeypatch.setattr(order, "write_forecasts", lambda plan: {})
    monkeypatch.setattr(sweep.Planned, "status", "diverged")
    plan = plan_of(tmp_path, run, holdout=lambda base: [larger], forecast=None)
    assert order.carry_out(plan, engine=None) == 0
    assert capsys.readouterr().out == "diverged: larger: its forecast can't be checked\n"


def test_each_of_several_workers_has_cores_of_its_own_and_all_have_as_many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 8})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [set(share.cores) for share in shares(2, planned=9)] == [{2, 3}, {5, 7}]
    assert [share.cores for share in shares(2, planned=1)] == [None]


def test_cores_do_not_depend_on_how_many_runs_are_missing(bits, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run, got = bits.get_config("small"), []
    plan = plan_of(tmp_path, *(dataclasses.replace(run, seed=seed) for seed in range(5)))

    def engine(runs, planned, before):
        got.append((len(runs), shares(None, planned)))
        return {}

    order.carry_out(plan, engine)
    complete = plan.sweep[:4]
    monkeypatch.setattr(sweep.Planned, "complete", property(lambda item: item in complete))
    order.carry_out(plan, engine)
    assert [missing for missing, _ in got] == [5, 1]
    assert got[0][1] == got[1][1] == [Share(frozenset({core})) for core in range(4)]


def test_workers_take_turns_at_gpus_and_divide_their_memory(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    environments = [dict(share.environment) for share in shares(4, planned=9)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["0", "3", "0", "3"]
    assert {each["XLA_PYTHON_CLIENT_MEM_FRACTION"] for each in environments} == {"0.450"}


# ---- the command ----


def test_a_machine_with_tpus_is_one_worker_s_and_its_meshes_are_not_judged_by_the_launcher(bits, monkeypatch):
    """libtpu serves one process; the launcher itself has CPU devices alone, and the worker has its chips."""
    wide = config.replace(bits.get_config("small"), "execution.mesh", MeshConfig(fsdp=64))
    pack = types.SimpleNamespace(runs=[types.SimpleNamespace(run=wide)])
    with pytest.raises(UserError, match="64 devices"):
        local.refuse_meshes([pack])
    monkeypatch.setattr(pathlib.Path, "glob", lambda place, what: iter(["accel0"] * (what == "accel[0-9]*")))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local.refuse_meshes([pack])
    assert shares(None, planned=9) == shares(1, planned=9) == [Share()]
    with pytest.raises(UserError, match="8 workers on a machine with TPUs, which serve one process"):
        shares(8, planned=9)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    code, out, err = ended(launched(f"--config={BITS}", "--dry_run", f"--folder={tmp_path / 'runs'}"))
    assert code == 0, err
    assert re.search(r"grid +3 +0 +1,600", out)
    assert re.search(r"to do: 3 runs, .* FLOPs\nabout .* at .* FLOP/s", out)
    assert not (tmp_path / "runs").exists()


def test_a_user_error_is_one_line_and_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "runs"
    code, _, err = ended(launched(f"--config={BITS}", "--config.execution.mesh.data=3", f"--folder={folder}"))
    assert code == 2
    assert len(re.findall("^error: .*$", err, re.MULTILINE)) == 1, err
    assert "Traceback" not in err
    assert not folder.exists()


def test_what_is_interrupted_continues_and_what_is_complete_is_skipped(tmp_path):
    """By ctrl-C first, then by SIGTERM; the only checkpoints are those of being stopped."""
    command = f"--config={BITS}:slow", f"--folder={tmp_path}", "--workers=1"
    command += ("--config.execution.checkpoint.every_steps=0",)
    steps = lambda: [len(records.metrics(path.parent)) for path in tmp_path.glob("*/metrics")]  # noqa: E731
    for signal_sent, ends_with in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before, process = max(steps(), default=0), launched(*command)
        wait_for(lambda: max(steps(), default=0) > before, process)  # noqa: B023
        process.send_signal(signal_sent)
        code, out, err = ended(process)
        assert code == ends_with, err
        assert "to continue: " in out
        (folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
        assert records.load_run(folder)["status"] == "missing"

    code, out, err = ended(launched(*command))
    assert code == 0, err
    first, second, third = (start["resume_at"] for start in records.starts(folder))
    assert 0 == first < second < third < 100

    assert records.load_run(folder)["result"]["seed_and_step"] == 100, "workers call the experiment's hooks"

    code, out, err = ended(launched(*command))
    assert (code, err) == (0, "")
    assert re.search(r"grid +1 +1 ", out)
    assert len(records.starts(folder)) == 3


# ---- faults ----


def test_a_killed_worker_is_replaced_and_its_run_ends_as_if_undisturbed(bits, tmp_path):
    run = bits.get_config("slow")
    plan = plan_of(tmp_path / "killed", run)
    checkpoints = plan.runs[0].folder / "checkpoints"

    assert trained_though_killed(plan, lambda: any(checkpoints.glob("*.json"))) == {}
    starts = records.starts(plan.runs[0].folder)
    assert len(starts) == 2
    assert starts[1]["resume_at"] > 0
    undisturbed = train(run, tmp_path / "undisturbed")
    assert plan.runs[0].status == "done"
    assert records.load_run(plan.runs[0].folder)["result"]["train_loss"] == undisturbed["train_loss"]


def test_runs_that_fail_are_recorded_and_the_sweep_goes_on(bits, tmp_path):
    run = bits.get_config("small")
    broken, deadly = changed(run, trouble="error"), changed(run, trouble="kill")
    wild = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=1e38))
    plan = plan_of(tmp_path, broken, deadly, wild, run)
    failures = {item.run.data.trouble: reason for item, reason in trained(plan, workers=2).items()}
    assert failures == {
        "error": "RuntimeError: these bits are broken",
        "kill": "its worker was killed by SIGKILL (out of memory?), 3 times at step 0",
    }
    assert [item.status for item in plan.runs] == ["failed", "failed", "diverged", "done"]
    assert "these bits are broken" in (plan.runs[0].folder / sweep.LOG).read_text()
    assert sweep.failure(plan.runs[1].folder)["reason"] == failures["kill"]
    assert "RuntimeError: these bits are broken" in sweep.failure(plan.runs[0].folder)["log"]
    assert len(records.starts(plan.runs[1].folder)) == 3


def test_a_damaged_folder_is_a_failure_of_its_run_alone(bits, tmp_path):
    run = bits.get_config("small")
    plan = plan_of(tmp_path, changed(run, trouble="user"), run)  # refused after its record has begun
    failures = trained(plan)
    assert failures == {plan.runs[0]: "these bits are not for you"}
    assert [item.status for item in plan.runs] == ["failed", "done"]
    assert "these bits are not for you" in (plan.runs[0].folder / sweep.LOG).read_text()


def test_a_refusal_of_all_that_is_left_is_one_user_error(bits, tmp_path):
    run = changed(bits.get_config("small"), trouble="user")
    plan = plan_of(tmp_path, run, dataclasses.replace(run, seed=1))
    with pytest.raises(UserError, match=r"^these bits are not for you$"):
        trained(plan)
    assert [item.status for item in plan.runs] == ["failed", "failed"]


def test_two_launchers_share_a_sweep_and_no_run_is_done_twice(bits, tmp_path):
    run = changed(bits.get_config("small"), seconds=0.001)
    plan = plan_of(tmp_path, *(dataclasses.replace(run, seed=seed) for seed in range(3)))
    failures = []
    launchers = [threading.Thread(target=lambda: failures.append(trained(plan))) for _ in range(2)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    assert failures == [{}, {}]
    assert [item.status for item in plan.runs] == ["done"] * 3
    assert [len(records.starts(item.folder)) for item in plan.runs] == [1, 1, 1]


def test_a_place_that_joins_takes_what_a_dead_machine_had(bits, tmp_path, monkeypatch):
    """The run of a machine that gives no sign any more, but not the one that this process has.

    And not the one that has taken three places with it: that is given up, though no pool saw it die.
    """
    monkeypatch.setattr(claims, "LEASE", 1.0)
    run = bits.get_config("small")
    plan = plan_of(tmp_path, *(dataclasses.replace(run, seed=seed) for seed in range(3)))
    dead, mine, deadly = plan.runs
    for number in range(3):
        there = store(deadly.folder / "claims")
        owner = {"machine": claims._machine(), "pid": os.getpid(), "born": "another"}
        there.create(f"{number:05d}", json.dumps(owner).encode())
        there.write(f"{number:05d}.sign", b'{"beat": 3, "from": 0}')
    there = store(dead.folder / "claims")
    there.create("00000", b'{"machine": "another", "pid": 1}')
    there.write("00000.sign", b'{"beat": 3}')
    claim = claims.take(mine.folder)
    for item in plan.runs:
        described = facts.described(item.run, item.run.data.open())
        (item.folder / "config.json").write_text(files.dumps(described))
    failures = Pool(packed(plan.runs, 1, 1), BITS, [Share()], joins=True).run()
    assert failures == {deadly: "the process that trained it died, 3 times at step 0"}
    assert [item.status for item in plan.runs] == ["done", "running", "failed"]
    claim.release()


def test_what_was_measured_is_not_written_over_by_another_config(tmp_path):
    order.refuse_another(tmp_path, {"rounds": 2})
    files.write_atomically(tmp_path / "result.json", '{"config": {"rounds": 2, "sizes": [1, 2]}}')
    order.refuse_another(tmp_path, {"rounds": 2, "sizes": (1, 2)})
    with pytest.raises(UserError, match="a result with another sizes; name another folder by --folder"):
        order.refuse_another(tmp_path, {"rounds": 2, "sizes": (1, 3)})


def test_what_is_no_number_is_null_where_a_measurement_is_written(tmp_path):
    experiment = types.SimpleNamespace(scale="cpu", config={})
    order.write_result(tmp_path, experiment, {"all": {"bounds": (float("nan"), 1.0)}})
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {"scale": "cpu", "config": {}, "all": {"bounds": [None, 1.0]}}
