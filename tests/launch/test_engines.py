"""What all engines have in common, and what each of them asks its own tools for."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from absl import flags
from test_local import BITS, plan_of, wait_for

from launch import engine, jobs, local, outage, ray_cluster, retry, slurm, status, stop
from launch.pool import WorkersError
from llm_jax import claims, config, experiment_file
from llm_jax.config import UserError
from llm_jax.store import store


@pytest.fixture
def bits():
    return experiment_file.load_experiment(str(BITS))[0]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(dollars_per_hour=2.0, pack="auto", each=1))


class Places:
    """An engine whose places do to the runs what `lives` says, one life each."""

    name = "places"

    def __init__(self, *lives):
        self.lives, self.started, self.stopped, self.taken = list(lives), [], [], set()

    def start(self, command):
        self.started.append(command)
        self.lives.pop(0)()
        return f"job{len(self.started)}"

    def living(self, jobs):
        return set()

    def lost(self, job):
        return job in self.taken

    def stop(self, jobs):
        self.stopped.append(list(jobs))

    def tail(self, job):
        return f"no room in {job}"

    def waits(self):
        return "no room yet"


def interrupted(*_):
    raise KeyboardInterrupt


def begin(run):
    run.folder.mkdir(exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps({"identity": run.identity}))


def ended(run, **result):
    def end():
        claims.take(run.folder).release()
        content = {"status": "done", "wall_seconds": 10.0, "loss": 1.0} | result
        begin(run)
        (run.folder / "result.json").write_text(json.dumps(content))

    return end


def crew_of(places, tmp_path, bits, runs=2):
    base = bits.get_config("small")
    plan = plan_of(tmp_path, *(config.replace(base, "seed", seed) for seed in range(runs)))
    plan.write()
    return plan.sweep, engine.Crew(places, tmp_path, 1, ["train"])


def test_a_place_that_dies_is_filled_again_until_every_run_has_ended(bits, tmp_path):
    places = Places()
    (first, second), crew = crew_of(places, tmp_path, bits)
    places.lives = [ended(first), lambda: None, lambda: second.record_failure("it broke")]
    before = []
    assert crew.train([first, second], 2, lambda: before.append(len(places.started))) == {second: "it broke"}
    assert before == [0] and [command[0] for command in places.started] == ["train"] * 3
    assert len({command[1] for command in places.started}) == 3, "each has a name of its own"
    assert jobs.listed(tmp_path) == {"places": ["job1", "job2", "job3"]}
    assert jobs.dollars_per_hour(tmp_path) == 2.0


def test_where_no_place_gets_to_a_run_the_launch_ends_with_what_one_printed(bits, tmp_path):
    places = Places(*[lambda: None] * 9)
    runs, crew = crew_of(places, tmp_path, bits)
    with pytest.raises(RuntimeError, match=r"workers get no run on\nno room in job"):
        crew.train(runs, 2, lambda: None)
    assert places.stopped == [[]]


def test_places_that_were_taken_away_are_filled_again_and_again(bits, tmp_path):
    places = Places()
    (run,), crew = crew_of(places, tmp_path, bits, runs=1)
    places.lives = [*[lambda: None] * 3 * engine.TRIES, ended(run)]
    places.taken = {f"job{number}" for number in range(1, 3 * engine.TRIES + 1)}
    assert crew.train([run], 1, lambda: None) == {}


@pytest.mark.parametrize(
    ("runs", "busy", "started"), [(1, 0, 1), (3, 0, 3), (20, 0, 16), (3, 2, 3), (2, 2, 2)]
)
def test_there_are_as_many_places_as_runs_that_they_can_take(
    runs, busy, started, bits, tmp_path, monkeypatch
):
    """However long places take to come up. busy: how many of the first ones have begun a run."""

    class Slow(Places):
        def start(self, command):
            self.started.append(command[-1].removeprefix("--place="))
            return self.started[-1]

        def living(self, jobs):
            return set(jobs)

    places = Slow()
    items, crew = crew_of(places, tmp_path, bits, runs)
    crew._places = 16
    crew._look(items)
    owned = []
    for item, place in zip(items[:busy], places.started, strict=False):
        monkeypatch.setenv(claims.PLACE, place)
        owned.append(claims.take(item.folder))
    monkeypatch.setenv(claims.PLACE, "another launcher's")
    for _ in range(3):
        assert crew._look(items)
    assert len(places.started) == started
    for claim in owned:
        claim.release()


def test_an_outage_of_the_folder_is_waited_for_and_told_once(bits, tmp_path, monkeypatch, capsys):
    places = Places()
    (run,), crew = crew_of(places, tmp_path, bits, runs=1)
    places.lives = [ended(run)]
    look, fails = crew._look, [OSError(errno.ESTALE, "stale handle", "/mnt/runs")] * 3

    def looks(missing):
        if fails:
            raise fails.pop()
        return look(missing)

    monkeypatch.setattr(crew, "_look", looks)
    assert crew.train([run], 1, lambda: None) == {}
    assert capsys.readouterr().out.count("/mnt/runs: stale handle; it is asked again for 10 min") == 1
    monkeypatch.setattr(outage, "SECONDS_OF_PATIENCE", -1.0)
    fails += [OSError(errno.ESTALE, "stale handle", "/mnt/runs")] * 2
    with pytest.raises(OSError, match="stale handle"):
        crew.train([run], 1, lambda: None)


def test_a_launch_saves_when_its_terminal_is_closed():
    code = """
import os, signal, sys, time
from launch import engine
def launch():
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(60)
sys.exit(engine.stoppable("local", launch))
"""
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 143
    assert time.monotonic() - begun < 60


def test_a_launch_without_workers_that_work_ends_with_what_one_printed(capsys):
    def launch():
        raise WorkersError("local: workers get no run on\nno room")

    handled = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in handled]
    try:
        assert engine.stoppable("local", launch) == 1
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == "error: local: workers get no run on\nno room\n"


def test_places_that_die_with_a_run_are_not_filled_for_ever(bits, tmp_path):
    """A run that is begun again and again from one step is no progress."""
    places = Places()
    runs, crew = crew_of(places, tmp_path, bits)

    def die():
        there, number = store(f"{runs[0].folder}/claims"), len(places.started)
        there.create(
            f"{number:05d}", json.dumps({"machine": claims._machine(), "pid": 1, "born": 0}).encode()
        )
        there.write(f"{number:05d}.sign", b'{"beat": 1, "from": 20}')

    places.lives = [die] * 20
    with pytest.raises(RuntimeError, match="workers get no run on"):
        crew.train(runs, 2, lambda: None)
    assert len(places.started) == engine.TRIES + 1


def test_what_is_stopped_leaves_no_place_running_and_what_was_waited_for_is_told(bits, tmp_path, capsys):
    places = Places(lambda: (tmp_path / engine.STOP).touch())
    runs, crew = crew_of(places, tmp_path, bits)
    with pytest.raises(KeyboardInterrupt):
        crew.train(runs, 2, lambda: None)
    assert len(places.started) == 1 and len(places.stopped) == 1
    assert re.search("0/2 runs done, .*; waits: no room yet", capsys.readouterr().out)


# ---- status ----


def test_the_status_says_what_is_done_runs_waits_and_failed_and_what_is_left(bits, tmp_path):
    (done, fails, runs, _), _ = crew_of(Places(), tmp_path, bits, runs=4)
    ended(done)()
    fails.record_failure("it broke")
    claim = claims.take(runs.folder)
    claim.begin(0)
    claim.move(50)
    claim.beat()
    found = status.rows(tmp_path)
    assert [row.state for row in found] == ["done", "failed", "running", "waiting"]
    assert "step 50 of 100" in status.table(found)
    assert re.search(r"failed +\S.* it broke", status.table(found))
    # 1.5 runs of about 10 s (the one that runs has just begun) by one worker at $2 an hour.
    assert status.seconds_left(found) == pytest.approx(15 / 1.5, rel=0.05)
    assert status.line(found, 2.0).endswith("0:10 left, $0.01 left")
    claim.release()


def test_the_status_says_for_how_long_there_was_no_sign_of_an_owner_elsewhere(bits, tmp_path):
    """Whether it lives, one look can't know."""
    (run,), _ = crew_of(Places(), tmp_path, bits, runs=1)
    begin(run)
    there = store(f"{run.folder}/claims")
    there.create("00000", b'{"machine": "another", "pid": 1}')
    there.write("00000.sign", json.dumps({"beat": 3, "time": time.time() - 86400}).encode())
    (row,) = status.rows(tmp_path)
    assert row.state == "running" and row.detail.endswith("no sign for 24.0 h")


def test_the_status_of_a_run_is_the_launcher_s(bits, tmp_path):
    """A run that was stopped early is complete only where the rule is asked for."""
    base = bits.get_config("small")
    rule = config.replace(base, "execution.stopping.margin", 0.5)
    for number, run in enumerate((base, rule)):
        plan = plan_of(tmp_path / str(number), run)
        plan.write()
        (item,) = plan.runs
        ended(item, status="stopped")()
        (row,) = status.rows(tmp_path / str(number))
        assert (item.complete, row.complete) == (run is rule, run is rule)
        (item.folder / "config.json").write_text("")
        (row,) = status.rows(tmp_path / str(number))
        assert row.state == "failed" and "config.json" in row.detail


def test_a_place_that_was_stopped_has_not_failed(bits, tmp_path, monkeypatch):
    """Or its cluster starts it again."""
    plan = plan_of(tmp_path, bits.get_config("small"))
    monkeypatch.setattr(local.sweep, "make_plan", lambda *_: plan)
    monkeypatch.setattr(local.sweep, "without_effect", lambda _: [])
    given = {"workers": 1, "pack": "off", "join": True, "again": False, "dry_run": False}
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**given))
    monkeypatch.setattr(local.Pool, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.launch(plan.experiment, tmp_path)
    (tmp_path / engine.STOP).touch()
    assert local.launch(plan.experiment, tmp_path) == 0


def test_what_was_given_up_is_tried_again_and_its_log_is_told(bits, tmp_path):
    (run, other), _ = crew_of(Places(), tmp_path, bits)
    for item in (run, other):
        item.folder.mkdir()
        (item.folder / "log.txt").write_text("...\nit was the disk\n")
        item.record_failure("it broke")
    with pytest.raises(UserError, match="not among those that were given up"):
        retry.retry(tmp_path, "nobody")
    assert retry.retry(tmp_path, run.label) == [f"{run.label}: it broke", "    ...", "    it was the disk"]
    assert (run.status, other.status) == ("missing", "failed")


def test_stopping_leaves_word_and_gives_back_what_waits(bits, tmp_path, monkeypatch):
    crew_of(Places(), tmp_path, bits)
    for job in ("17", "18"):
        jobs.enlist(tmp_path, "slurm", job)
    asked = []
    monkeypatch.setattr(slurm, "run", lambda command: asked.append(command) or "16\n18\n")
    assert stop.stop(tmp_path) == []
    assert (tmp_path / engine.STOP).exists()
    assert asked[-1] == ["scancel", "--state=PENDING", "18"]
    assert jobs.listed(tmp_path) == {}
    with pytest.raises(UserError, match="no plan here"):
        stop.stop(tmp_path / "elsewhere")


# ---- engines ----


def test_branches_wait_in_an_array_of_their_own_for_that_of_their_trunks(tmp_path):
    engine_ = slurm.Slurm(tmp_path, ["--partition=gpu"])
    line = engine_.line(4, ["17", "18"])
    assert {"--array=0-3", "--dependency=afterany:17:18", "--requeue", "--partition=gpu"} <= set(line)
    trunk = types.SimpleNamespace(trunk=None, ready=True, complete=False)
    branch = types.SimpleNamespace(trunk=trunk, ready=False, complete=False)
    assert (slurm._depth(trunk), slurm._depth(branch)) == (0, 1)


PLACE = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(
    ("asked", "code", "stopped", "again"),
    [
        (signal.SIGUSR1, 143, False, True),  # its time is over
        (signal.SIGUSR1, 143, True, False),
        (signal.SIGUSR1, 1, False, False),
        (signal.SIGTERM, 75, False, False),
        (signal.SIGTERM, 143, False, False),  # scancel, or a preemption, after which Slurm itself queues it
    ],
)
def test_a_job_out_of_time_is_queued_again_and_a_cancelled_one_is_not(asked, code, stopped, again, tmp_path):
    """Both save. The script alone, by bash; `scontrol` is replaced by one that leaves a file."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    trains = f"touch {tmp_path}/trains; while :; do sleep 0.05; done"
    train = ["sh", "-c", f"trap 'sleep 0.2; exit {code}' TERM; {trains}"]
    if stopped:
        (tmp_path / engine.STOP).touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | PLACE
    script = slurm.Slurm(tmp_path).script(train)
    job = subprocess.Popen(["bash", "-c", script], env=environment)
    wait_for(lambda: (tmp_path / "trains").exists())
    job.send_signal(asked)
    assert job.wait() == code
    assert (tmp_path / "asked").exists() == again


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("'--time", "No closing quotation"),
        ("--array=0-3", "--workers says how many jobs"),
        ("--time=1:00 -N2", "--hosts of how many nodes each"),
    ],
)
def test_options_of_sbatch_that_are_the_launcher_s_are_refused(given, told):
    with pytest.raises(UserError, match=f"--sbatch={re.escape(given)}: .*{told}"):
        slurm.options(given)
    assert slurm.options("--time=4:00:00 --partition=gpu") == ["--time=4:00:00", "--partition=gpu"]


def test_a_ray_cluster_that_has_gone_is_missed_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        ray_cluster.check_reachable(there)
    with pytest.raises(UserError, match=rf"no Ray cluster answers at {there} \(.*\): ray stop and ray start"):
        ray_cluster.check_reachable(there)
    ray_cluster.check_reachable("ray://there:10001")  # by Ray's own client, which says so itself


@pytest.mark.parametrize(
    ("prints", "told"),
    [
        (
            "sbatch: error: no partition x\nsbatch: error: no job",
            "sbatch: no partition x; no job",
        ),
        (
            "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sbatch: fatal: Could not establish a configuration source",
            "no Slurm cluster here: no slurm.conf is found, which SLURM_CONF may name",
        ),
    ],
)
def test_what_slurm_refuses_is_told_in_a_line(prints, told, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{prints}\nEND\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError) as error:
        slurm.run(["sbatch"])
    assert str(error.value) == told


def test_a_job_killed_for_its_memory_is_queued_again_a_few_times(tmp_path):
    """What took its place with it is found by its deaths, and given up."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    script = slurm.Slurm(tmp_path).script(["sh", "-c", "kill -KILL $$"])
    for restarts in ("0", str(slurm.TRIES)):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | PLACE
        job = subprocess.run(["bash", "-c", script], env=environment | {"SLURM_RESTART_COUNT": restarts})
        assert job.returncode == 137
    assert (tmp_path / "asked").read_text() == "requeue 17_2\n"


def test_resources_of_a_ray_task_are_read_or_refused():
    resources = {"num_cpus": 2.0, "resources": {"TPU-v5litepod-8-head": 1.0}}
    assert ray_cluster.asked("CPU=2,TPU-v5litepod-8-head=1") == (resources, 1)
    assert ray_cluster.Ray("TPU-v5litepod-16-head=1").hosts == 4
    with pytest.raises(UserError, match=r"NAME=NUMBER"):
        ray_cluster.asked("CPU")
    with pytest.raises(UserError, match="stands for a slice's 4"):
        ray_cluster.Ray("TPU-v5litepod-16-head=1", hosts=2)


def test_tasks_of_one_machine_keep_to_cores_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 6, 9})
    with contextlib.ExitStack() as one:
        assert ray_cluster.own_cores(2, one) == {3, 4}
        with contextlib.ExitStack() as other:
            assert ray_cluster.own_cores(2, other) == {5, 6}
            assert ray_cluster.own_cores(2, other) == {3, 4, 5, 6, 9}, "there are no two left"
        assert ray_cluster.own_cores(2, one) == {5, 6}
        assert ray_cluster.own_cores(0, one) == {3, 4, 5, 6, 9}
