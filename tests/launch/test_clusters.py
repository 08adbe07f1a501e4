"""Sweeps on real clusters on this machine, disturbed: every run ends as in a sweep that nobody disturbed."""

import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import hasty
import pytest

from launch import status
from launch.slurm import Slurm
from llm_jax import claims, config, experiment_file, records
from llm_jax.train import train

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SWEEP = HERE / "clusters.py"
LONG_SECONDS = 600.0  # what takes so long hangs, on however loaded a machine


@pytest.fixture(autouse=True)
def where_processes_find_things(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(ROOT)


def wait_for(condition):
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def command(engine, scale, folder, *more):
    where = f"--config={SWEEP}:{scale}", f"--folder={folder}"
    return [sys.executable, "-m", f"launch.{engine}", *where, "--workers=2", "--each=1", *more]


def rows(folder):
    return status.rows(folder) if (folder / "plan.json").exists() else []


def training(folder):
    """The processes that train now, past their first checkpoint, and their runs' folders."""
    owners = {
        path.parent: claims.owner(path.parent) for path in folder.glob("*/claims") if claims.held(path.parent)
    }
    return [(owner["pid"], run) for run, owner in owners.items() if owner.get("step", 0) > 25]


def assert_undisturbed(scale, folder, tmp_path, cores=os.cpu_count()):
    """To the bit where the runs' processes had all cores, as here; with fewer, sums are rounded otherwise."""
    module, _ = experiment_file.load_experiment(str(SWEEP))
    runs = module.sweep(module.get_config(scale))
    assert [row.state for row in rows(folder)] == ["done"] * len(runs)
    for run in runs:
        found = records.load_run(folder / run.identity())["result"]
        alone = train(config.replace(run, "data.seconds", 0.0), tmp_path / "alone" / run.identity())
        exact = 0.0 if cores == os.cpu_count() else 1e-6
        assert found["train_loss"] == pytest.approx(alone["train_loss"], rel=0.0, abs=exact)


# ---- Slurm ----


@pytest.fixture
def slurm(tmp_path, monkeypatch, request):
    """A cluster of one node, or as many as are asked for, on this machine; how many."""
    script, folder, nodes = HERE / "slurm_cluster.sh", tmp_path / "cluster", getattr(request, "param", 1)
    started = subprocess.run([script, "start", folder, str(nodes)], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no Slurm cluster: {started.stderr.strip()}")
    monkeypatch.setenv("SLURM_CONF", started.stdout.strip())
    yield nodes
    subprocess.run([script, "stop", folder], check=True)


def queue():
    return subprocess.run(
        ["squeue", "--noheader", "--format=%i %T %r"], capture_output=True, text=True
    ).stdout


def hurry():
    """Whether the queue is empty; what was requeued isn't held back for the two minutes that Slurm takes."""
    for line in queue().splitlines():
        if line.endswith("BeginTime"):
            time.sleep(2.0)  # in the second in which it ended it would be taken for the one that has ended
            job = f"JobId={line.split()[0]}"
            subprocess.run(["scontrol", "update", job, "StartTime=now"], check=False)
    return not queue()


@pytest.mark.slow
def test_slurm_trains_branches_after_trunks_and_what_is_requeued_goes_on(slurm, tmp_path):
    folder = tmp_path / "sweep"
    too_much = command("slurm", "branches", folder, "--sbatch=--cpus-per-task=64")
    refused = subprocess.run(too_much, capture_output=True, text=True)
    assert refused.returncode == 2 and "node configuration is not available" in refused.stderr
    assert not folder.exists()
    subprocess.run(command("slurm", "branches", folder), check=True, capture_output=True)
    assert queue().count("PENDING") >= 2, "the branches' array and the last job wait for the trunks' array"
    wait_for(lambda: training(folder))
    jobs = [line.split()[0] for line in queue().splitlines() if "RUNNING" in line]
    subprocess.run(["scontrol", "requeue", jobs[0]], check=True)
    wait_for(hurry)
    assert_undisturbed("branches", folder, tmp_path)
    starts = [len(records.starts(path.parent)) for path in folder.glob("*/config.json")]
    assert sum(starts) > len(starts), "one of them was continued"
    assert [bool(records.trunk(path.parent)) for path in folder.glob("*/config.json")].count(True) == 2


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [1, 2], indirect=True)
def test_a_job_out_of_time_saves_and_comes_again_and_a_cancelled_one_only_saves(slurm, tmp_path):
    """On every node of a job; and the other job of its array goes on."""

    def on_all(what, place=1):
        return len(list(tmp_path.glob(f"{what}.{place}.*"))) == slurm

    def touch(what):
        return f"touch {tmp_path}/{what}.$SLURM_ARRAY_TASK_ID.${{SLURM_PROCID:-0}}"

    saves = f"trap '{touch('saved')}; exit 143' TERM; {touch('trains')}; while :; do sleep 0.1; done"
    job = Slurm(tmp_path, hosts=slurm).start(["sh", "-c", saves], places=2)  # its last has its number
    wait_for(lambda: on_all("trains", 0) and on_all("trains"))
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], check=True)
    wait_for(lambda: "PENDING" in queue())
    assert on_all("saved") and not list(tmp_path.glob("saved.0.*"))
    for file in tmp_path.glob("*.1.[01]"):
        file.unlink()
    wait_for(lambda: hurry() or on_all("trains"))
    subprocess.run(["scancel", job], check=True)
    wait_for(lambda: not re.search("RUNNING|COMPLETING", queue()))
    assert on_all("saved", 0) and on_all("saved")
    assert not queue()


# ---- Ray ----


def ray(*arguments):
    line = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def processes(port):
    """Those of the Ray cluster at `port`, with their command lines."""
    for place in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = place.read_bytes().decode()
            if "/ray/" in line and re.search(rf"(:|port=){port}\b", line):
                yield int(place.parent.name), line.split("\0")


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores, to which the launcher belongs, and two nodes with one core each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray isn't installed: pip install -e '.[ray]'")
    port, quiet = 6390 + os.getpid() % 100, "--disable-usage-stats"
    monkeypatch.setenv("XLA_FLAGS", hasty.flags(devices=1))
    address = f"127.0.0.1:{port}"
    ray("start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", quiet)
    monkeypatch.setenv("RAY_ADDRESS", address)

    def nodes():
        return {pid for pid, line in processes(port) if line[0].endswith("/raylet")}

    def add_node():
        ray("start", f"--address={address}", "--num-cpus=1", quiet)

    head = nodes()
    add_node()
    add_node()
    yield lambda: nodes() - head, add_node
    for pid, _ in processes(port):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_ray_sweep_survives_a_killed_worker_and_a_killed_raylet_and_nodes_train_together(cluster, tmp_path):
    nodes, add_node = cluster
    folder = tmp_path / "sweep"
    assert [what_is_waited_for(hosts) for hosts in (2, 3)] == ["", "Ray: 2 of 3 nodes have CPU=1"]
    launcher = subprocess.Popen(command("ray_cluster", "twelve", folder), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: training(folder))
    os.kill(training(folder)[0][0], signal.SIGKILL)
    wait_for(lambda: sum(row.state == "done" for row in rows(folder)) >= 4 and training(folder))
    os.kill(min(nodes()), signal.SIGKILL)
    add_node()
    out, _ = launcher.communicate(timeout=LONG_SECONDS)
    assert launcher.returncode == 0, out
    assert_undisturbed("twelve", folder, tmp_path, cores=1)
    assert_trained_together(tmp_path / "pair", tmp_path)


def what_is_waited_for(hosts):
    asks = f"from launch.ray_cluster import Ray; print(Ray('CPU=1', hosts={hosts}).waits())"
    said = subprocess.run([sys.executable, "-c", asks], check=True, capture_output=True, text=True).stdout
    return said.strip()


def assert_trained_together(folder, tmp_path):
    """A sweep of runs over two nodes of the cluster, each of which keeps to its core."""
    line = command("ray_cluster", "pair", folder, "--hosts=2", "--workers=1")
    launcher = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: training(folder))
    place = subprocess.run(["pgrep", "-f", f"launch.local .*--folder={folder} .*--join"], capture_output=True)
    cores = [os.sched_getaffinity(int(pid)) for pid in place.stdout.split()]
    assert list(map(len, cores)) == [1, 1] and len(set.union(*cores)) == min(2, os.cpu_count())
    out, _ = launcher.communicate(timeout=LONG_SECONDS)
    assert launcher.returncode == 0, out
    assert_undisturbed("pair", folder, tmp_path, cores=1)
