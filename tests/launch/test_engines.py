"""What all engines have in common, and what each of them asks its own tools for."""

import json
import re
import shutil
import signal
import subprocess
import time
import types

import pytest
from absl import flags
from test_local import BITS, plan_of, wait_for

from launch import engine, jobs, jobset, local, ray_cluster, retry, slurm, status, stop, sweep, tpu
from llm_jax import claims, config, records
from llm_jax.config import UserError
from llm_jax.store import store


@pytest.fixture
def bits():
    return config.load_experiment(str(BITS))[0]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(dollars_per_hour=2.0, pack="auto", each=1))


class Places:
    """An engine whose places do to the runs what `lives` says, one life each."""

    name = "places"

    def __init__(self, *lives):
        self.lives, self.started, self.stopped = list(lives), [], []

    def start(self, command):
        self.started.append(command)
        self.lives.pop(0)()
        return f"job{len(self.started)}"

    def living(self, jobs):
        return set()

    def stop(self, jobs):
        self.stopped.append(list(jobs))

    def tail(self, job):
        return f"no room in {job}"


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
    assert (before, places.started) == ([0], [["train"]] * 3)
    assert jobs.listed(tmp_path) == {"places": ["job1", "job2", "job3"]}
    assert jobs.dollars_per_hour(tmp_path) == 2.0


def test_where_no_place_gets_to_a_run_the_launch_ends_with_what_one_printed(bits, tmp_path):
    places = Places(*[lambda: None] * 9)
    runs, crew = crew_of(places, tmp_path, bits)
    with pytest.raises(RuntimeError, match=r"workers get no run on\nno room in job"):
        crew.train(runs, 2, lambda: None)
    assert places.stopped == [[]]


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


def test_what_is_stopped_leaves_no_place_running(bits, tmp_path):
    places = Places(lambda: (tmp_path / engine.STOP).touch())
    runs, crew = crew_of(places, tmp_path, bits)
    with pytest.raises(KeyboardInterrupt):
        crew.train(runs, 2, lambda: None)
    assert len(places.started) == 1 and len(places.stopped) == 1


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

    def asked_to_stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(local.Pool, "run", asked_to_stop)
    with pytest.raises(KeyboardInterrupt):
        local.launch(plan.experiment, tmp_path)
    (tmp_path / engine.STOP).touch()
    assert local.launch(plan.experiment, tmp_path) == 0


def test_a_thousand_runs_are_planned_found_again_and_reported_in_less_than_five_seconds(bits, tmp_path):
    """About a second on an idle core, so that a slow machine passes too."""
    base = bits.get_config("small")
    runs = [config.replace(base, "seed", seed) for seed in range(1000)]
    for run in runs[:500]:
        (tmp_path / run.identity()).mkdir()
        described = {"identity": run.identity(), "config": config.to_json(run)}
        (tmp_path / run.identity() / "config.json").write_text(records.dumps(described))
        result = {"status": "done", "wall_seconds": 1.0, "loss": 1.0}
        (tmp_path / run.identity() / "result.json").write_text(records.dumps(result))
    begun = time.perf_counter()
    plan = plan_of(tmp_path, *runs)
    plan.write()
    assert "1000 runs" in sweep.summary(plan)
    assert status.line(status.rows(tmp_path)) == "500/1000 runs done, 500 waiting, 8:20 left"
    assert time.perf_counter() - begun < 5


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


@pytest.mark.parametrize(
    ("asked", "code", "stopped", "again"),
    [
        (signal.SIGUSR1, 143, False, True),  # its time is over
        (signal.SIGUSR1, 143, True, False),
        (signal.SIGUSR1, 1, False, False),
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
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    script = slurm.Slurm(tmp_path).script(train)
    job = subprocess.Popen(["bash", "-c", script], env=environment)
    wait_for(lambda: (tmp_path / "trains").exists())
    job.send_signal(asked)
    assert job.wait() == code
    assert (tmp_path / "asked").exists() == again


def test_a_job_killed_for_its_memory_is_queued_again_a_few_times(tmp_path):
    """What took its place with it is found by its deaths, and given up."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    script = slurm.Slurm(tmp_path).script(["sh", "-c", "kill -KILL $$"])
    for restarts in ("0", str(slurm.TRIES)):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
        job = subprocess.run(["bash", "-c", script], env=environment | {"SLURM_RESTART_COUNT": restarts})
        assert job.returncode == 137
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_resources_of_a_ray_task_are_read_or_refused():
    assert ray_cluster.asked("CPU=2,TPU-v5litepod-8-head=1") == {
        "num_cpus": 2.0,
        "resources": {"TPU-v5litepod-8-head": 1.0},
    }
    with pytest.raises(UserError, match=r"NAME=NUMBER"):
        ray_cluster.asked("CPU")
    with pytest.raises(UserError, match="v5litepod-16 is of several hosts"):
        ray_cluster.asked("TPU-v5litepod-16-head=1")


SLICES = tpu.Slices("Runs_1", "v5litepod-8", "v2-alpha-tpuv5-lite", "us-west4-a", "mine", True, "mount it")


class Recording:
    """In place of gcloud: keeps what it is asked, and answers; nothing leaves this machine.

    What has `broken` in it fails, and what has `hangs` never ends by itself.
    """

    def __init__(self, *states, broken="", hangs="nothing"):
        self.states, self.broken, self.hangs, self.commands = list(states), broken, hangs, []

    def __call__(self, command, log, in_vain):
        self.commands.append(command)
        text = " ".join(command)
        if self.hangs in text:
            wait_for(in_vain)
            return 255, "ended"
        if self.broken and self.broken in text:
            return 1, "no such luck"
        return 0, self.states.pop(0) if " describe " in text else ""

    def verbs(self):
        return [next(word for word in c if word in VERBS) for c in self.commands]


VERBS = {"create", "describe", "archive", "scp", "ssh", "delete"}


@pytest.fixture
def slices(tmp_path, monkeypatch):
    """The engine, with a gcloud of one's own."""
    monkeypatch.setattr(tpu, "SECONDS_BETWEEN_LOOKS", 0.0)
    return lambda gcloud: tpu.Tpu(tmp_path, SLICES, gcloud)


def live(engine_):
    job = engine_.start(["train"])
    engine_._threads[job].join()
    assert job.startswith("mine/us-west4-a/runs-1-")
    assert engine_.living([job]) == set()
    return engine_.tail(job)


def test_a_slice_is_made_waited_for_set_up_used_and_deleted(slices, tmp_path):
    gcloud = Recording("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    live(slices(gcloud))
    waits = ["describe"] * 3
    assert gcloud.verbs() == ["create", *waits, "archive", "scp", "ssh", "ssh", "ssh", "delete"]
    assert "--spot" in gcloud.commands[0] and "--force" in gcloud.commands[-1]
    assert "--command=cd llm_jax && exec train" in gcloud.commands[-2]
    assert jobs.listed(tmp_path) == {}


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_slice_that_is_taken_back_is_deleted_so_that_another_is_asked_for(state, slices):
    gcloud = Recording("WAITING_FOR_RESOURCES", state)
    live(slices(gcloud))
    assert gcloud.verbs() == ["create", "describe", "describe", "delete"]


def test_a_slice_that_breaks_is_deleted_and_says_why(slices):
    gcloud = Recording("ACTIVE", broken="exec train")
    assert live(slices(gcloud)).endswith("no such luck")
    assert gcloud.verbs()[-2:] == ["ssh", "delete"]


def test_a_slice_taken_back_while_it_trains_is_noticed_though_ssh_never_ends(slices):
    gcloud = Recording("ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", hangs="exec train")
    assert live(slices(gcloud)).endswith("ended")
    assert gcloud.verbs()[-5:] == ["ssh", "describe", "describe", "describe", "delete"]


def test_a_stop_does_not_wait_for_ever_for_what_hangs(slices, monkeypatch):
    monkeypatch.setattr(tpu, "SECONDS_TO_STOP", 0.1)
    gcloud = Recording(*["ACTIVE"] * 10**6, hangs="exec train")
    engine_ = slices(gcloud)
    job = engine_.start(["train"])
    wait_for(lambda: "exec train" in " ".join(gcloud.commands[-1]) or gcloud.verbs()[-1] == "describe")
    engine_.stop([job])
    assert gcloud.verbs()[-1] == "delete"


def test_slices_are_listed_before_they_are_asked_for_until_they_have_gone(slices, tmp_path, capsys):
    """A launcher that dies loses track of none: the next one deletes them, or `launch.stop`."""
    known = []

    class Watched(Recording):
        def __call__(self, command, log, in_vain):
            if "create" in command:
                known.append(jobs.listed(tmp_path)["tpu"])
            return super().__call__(command, log, in_vain)

    live(slices(Watched("ACTIVE", broken=" delete ")))
    (left,) = known[0]
    assert jobs.listed(tmp_path) == {"tpu": [left]}
    assert f"{left}: NOT given back" in capsys.readouterr().err
    theirs = SLICES.job("runs-1-other-0")  # of a launcher at work, and of one that has died
    dead = SLICES.job("runs-1-dead-0")
    for job in (theirs, dead):
        jobs.enlist(tmp_path, "tpu", job)
    assert claims.take(tmp_path / "launchers" / "runs-1-other")
    gcloud = Recording("ACTIVE")
    engine_ = slices(gcloud)
    engine_._launcher = "runs-1-next"  # a second has hardly passed
    live(engine_)
    assert tpu.deletion(dead) == gcloud.commands[0]
    assert jobs.listed(tmp_path) == {"tpu": sorted([left, theirs])}
    assert tpu.give_back([left], gcloud) == [left]


def test_what_is_run_for_a_slice_ends_with_all_it_started(monkeypatch):
    """As gcloud's ssh does, which keeps its output open."""
    monkeypatch.setattr(tpu, "SECONDS_BETWEEN_LOOKS", 0.1)
    code, printed = tpu.really(["sh", "-c", "echo begun; sleep 600 & wait"], None, lambda: True)
    assert (code, printed) == (-signal.SIGTERM, "begun\n")


def test_a_slice_of_several_hosts_is_refused():
    with pytest.raises(UserError, match="v4-32 is of several hosts"):
        tpu.Slices("runs", "v4-32", "", "", "", False, "")


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud isn't installed")
def test_commands_for_slices_are_as_gcloud_documents_them(slices):
    """Every flag of every command stands in the synopsis that gcloud itself prints for it."""
    gcloud = Recording("ACTIVE")
    live(slices(gcloud))
    synopses = {}
    for command in gcloud.commands:
        if command[0] == "git":
            continue
        words = tuple(command[:5])
        if words not in synopses:
            told = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True).stdout
            synopses[words] = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", told)
        for flag in command[5:]:
            name = flag.partition("=")[0]
            assert (
                not flag.startswith("--")
                or name in synopses[words]
                or name in ("--format", "--quiet", "--project")
            )


def test_the_manifest_asks_for_a_slice_for_each_worker_and_makes_dead_ones_again():
    made = jobset.manifest("sweep", ["python"], 3, "image", "disk", "/runs", "tpu-v5-lite-podslice", "2x4", 8)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["completions"], job["backoffLimit"]) == (3, 1, jobset.RESTARTS)
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
    assert job["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy is refused with any other"


@pytest.mark.parametrize(
    ("kind", "topology", "chips"),
    [
        ("tpu-v5-lite-podslice", "4x4", 8),
        ("tpu-v5-lite-podslice", "4x4", 16),
        ("tpu-v4-podslice", "2x2x2", 8),
        ("tpu-v5-lite-podslice", "eight", 8),
    ],
)
def test_a_slice_of_several_hosts_gets_no_manifest(kind, topology, chips):
    with pytest.raises(UserError, match="a pod on one host"):
        jobset.manifest("sweep", ["python"], 3, "image", "disk", "/runs", kind, topology, chips)
