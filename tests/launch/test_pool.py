"""The pool of workers by itself: workers that only write results, and folders that don't always answer."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import threading
import time
import types
import uuid

import pytest
from absl import flags
from test_local import BITS, bits, plan_of, where_workers_find_things

from launch import local, outage, pool, processes, status, sweep
from launch.packs import packed
from launch.pool import Pool
from launch.processes import Share
from llm_jax import config, files, records
from llm_jax.command_line import Chosen
from llm_jax.config import UserError
from llm_jax.schedules import WSD

__all__ = ["bits", "where_workers_find_things"]


class Process:
    """In place of a worker's: it is done with a task at once. Its first lives end as `ends` says."""

    ends, tasks, stopped = [], [], []

    def __init__(self, command, pass_fds, **_):
        self.stdin, self._pipe, self._code = self, os.dup(pass_fds[0]), None
        self._say(kind="ready")

    def write(self, line):
        runs = json.loads(line)["runs"]
        self.tasks.append([run["label"] for run in runs])
        match self.ends.pop(0) if self.ends else "":
            case "broken" | "taken" as kind:
                self._say(kind=kind, message="OSError: no disk")
                self._end(1)
            case "killed":
                self._end(-signal.SIGKILL)
            case "interrupted":
                raise KeyboardInterrupt
            case _:
                for number, run in enumerate(runs):
                    folder = files.path(run["folder"])
                    folder.mkdir(exist_ok=True)
                    described = {"identity": folder.name, "config": run["run"]}
                    (folder / "config.json").write_text(files.dumps(described))
                    result = {"status": "done", "wall_seconds": 1.0, "loss": 1.0}
                    (folder / "result.json").write_text(files.dumps(result))
                    self._say(kind="finished", run=number, status="done", loss=1.0, steps_shared=0)
                self._say(kind="ready")

    def terminate(self):
        self.stopped.append(self)
        self._end(143)

    def kill(self):
        self._end(-signal.SIGKILL)

    def wait(self, *_):
        return self._code

    def flush(self):
        pass

    def close(self):
        pass

    def _say(self, **message):
        os.write(self._pipe, json.dumps(message).encode() + b"\n")

    def _end(self, code):
        if self._code is None:
            os.close(self._pipe)
            self._code = code


@pytest.fixture
def workers(monkeypatch):
    """`Process` in place of all workers' processes."""
    monkeypatch.setattr(
        processes, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": Process})
    )
    monkeypatch.setattr(Process, "ends", [])
    monkeypatch.setattr(Process, "tasks", [])
    monkeypatch.setattr(Process, "stopped", [])
    return Process


def pool_of(plan):
    return Pool(packed(plan.runs, 1, 1), BITS, [Share()])


def seeds(bits, count):
    base = bits.get_config("small")
    return [config.replace(config.replace(base, "seed", n), "name", f"seed-{n}") for n in range(count)]


STALE = OSError(errno.ESTALE, "Stale file handle", "runs")


def fails(monkeypatch, name, when=lambda: True, error=STALE):
    """To ask a planned run for `name` raises `error` whenever `when()` is true."""
    there = getattr(sweep.Planned, name)

    def asked(run):
        if when():
            raise error
        return there.fget(run) if isinstance(there, property) else there(run)

    monkeypatch.setattr(sweep.Planned, name, property(asked) if isinstance(there, property) else asked)


def test_a_folder_that_does_not_answer_for_a_while_ends_no_launch_and_no_run_twice(
    bits, tmp_path, workers, monkeypatch, capsys
):
    """Every second look fails, whatever it is for, workers that break and that die among it."""
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0.001)
    plan = plan_of(tmp_path, *seeds(bits, 3))
    for name in ("status", "standing", "task"):
        fails(monkeypatch, name, when=itertools.cycle([True, False]).__next__)
    workers.ends += ["", "broken", "killed"]
    assert pool_of(plan).run() == {}
    assert workers.tasks == [["seed-0"], ["seed-1"], ["seed-1"], ["seed-1"], ["seed-2"]]
    said = capsys.readouterr().err
    assert said.count("Stale file handle; it is asked again for 10 min") == 1
    assert [f"try {n} of 3" in said for n in (2, 3, 4)] == [True, True, False], "each death counts once"


def test_a_folder_that_stays_out_of_reach_ends_the_launch_and_its_workers(
    bits, tmp_path, workers, monkeypatch
):
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(outage, "SECONDS_OF_PATIENCE", 0.05)
    plan, begun = plan_of(tmp_path, *seeds(bits, 2)), time.monotonic()
    fails(monkeypatch, "status")
    with pytest.raises(OSError, match="Stale file handle"):
        pool_of(plan).run()
    assert time.monotonic() - begun > 0.05
    assert (workers.tasks, len(workers.stopped)) == ([], 1)


def test_a_run_that_another_launcher_had_and_lost_is_trained(bits, tmp_path, workers, monkeypatch):
    """It was taken when the worker looked, and is free when the pool does."""
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0.001)
    workers.ends += ["taken"]
    assert pool_of(plan_of(tmp_path, *seeds(bits, 1))).run() == {}
    assert workers.tasks == [["seed-0"]] * 2


@pytest.mark.parametrize("error", [UserError("it is damaged"), BrokenPipeError()])
def test_what_does_not_pass_ends_a_launch_at_once(bits, tmp_path, workers, monkeypatch, error):
    plan = plan_of(tmp_path, *seeds(bits, 2))
    fails(monkeypatch, "status", error=error)
    with pytest.raises(type(error)):
        pool_of(plan).run()
    assert len(workers.stopped) == 1


def lengths(bits, seeds, count):
    """Runs of `count` lengths for each seed: a trunk and its branches."""
    base = config.replace(bits.get_config("small"), "optimizer.schedule", WSD(warmup_steps=2))
    return [
        dataclasses.replace(base, seed=seed, tokens=1600 * times, name=f"seed-{seed}-{times}")
        for seed in range(seeds)
        for times in range(1, count + 1)
    ]


def test_whether_branches_must_wait_is_asked_of_many_at_once_and_not_with_every_look(
    bits, tmp_path, monkeypatch
):
    """In a bucket, where each of them takes some requests; of trunks that ended here, nothing is asked."""
    plan = plan_of(tmp_path, *lengths(bits, 4, 10))
    asked, together = [], threading.Barrier(4 * 9)

    def ready(run):
        if len(asked) < 4 * 9:
            together.wait(60)
        asked.append(run)
        return False

    monkeypatch.setattr(sweep.Planned, "ready", property(ready))
    monkeypatch.setattr(files, "in_bucket", lambda folder: True)
    waiting = pool_of(plan)
    trunks = [run for run in plan.runs if run.trunk is None]
    for _ in range(3):
        assert {run for pack in waiting._ready() for run in pack.runs} == set(trunks)
    assert len(asked) == 4 * 9
    waiting._end(trunks[0], "done")
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_REQUESTS", 0.0)
    assert len(waiting._ready()) == 4 + 9 and len(asked) == (4 + 3) * 9


def launched(bits, runs, folder, monkeypatch):
    """As launch.local does it, with two workers; the exit code."""
    module = types.SimpleNamespace(__file__=str(BITS), sweep=lambda base: list(runs))
    given = {"workers": 2, "pack": "off", "join": False, "again": False, "dry_run": False}
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**given))
    monkeypatch.setattr(local, "matmul_speed", lambda: 1e10)  # which keeps all cores busy for a while
    return local.launch(Chosen(module, "small", runs[0], ()), folder)


def test_what_runs_in_a_bucket_are_asked_is_asked_of_many_at_once(bits, bucket, workers, monkeypatch):
    folder, one_by_one = files.path(f"{bucket}/{uuid.uuid4().hex}"), []
    read, runs = records.find_run, seeds(bits, 5)

    def find_run(place):
        if not getattr(files._within, "each", False):
            one_by_one.append(place)
        return read(place)

    monkeypatch.setattr(records, "find_run", find_run)
    workers.ends += [""] * 2 + ["interrupted"]
    with pytest.raises(KeyboardInterrupt):
        launched(bits, runs, folder, monkeypatch)
    assert launched(bits, runs, folder, monkeypatch) == 0
    assert status.line(status.rows(folder)) == "5/5 runs done"
    assert one_by_one == []


def test_a_thousand_runs_are_launched_resumed_and_reported_in_less_than_five_seconds(
    bits, tmp_path, workers, monkeypatch
):
    """Each of them, of a core's time, the writing of results included; nine of ten runs are branches.

    The slowest takes about two, so that a slow machine passes too; python's start and imports take as long.
    """
    runs = lengths(bits, 100, 10)
    workers.ends += [""] * 500 + ["interrupted"]

    def took(command):
        begun = time.process_time()
        command()
        return time.process_time() - begun

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            launched(bits, runs, tmp_path, monkeypatch)

    def reported(counts):
        assert status.table(status.rows(tmp_path)).splitlines()[-1].startswith(counts)

    def all_of_it():
        assert launched(bits, runs, tmp_path, monkeypatch) == 0

    seconds = {
        "launched and interrupted": took(interrupted),
        "reported": took(lambda: reported("500/1000 runs done, 500 waiting")),
        "resumed": took(all_of_it),
        "complete": took(all_of_it),
        "reported again": took(lambda: reported("1000/1000 runs done")),
    }
    assert len(workers.tasks) == 1001
    assert max(seconds.values()) < 5, seconds
