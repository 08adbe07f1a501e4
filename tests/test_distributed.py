"""Many processes are one run: its losses, its checkpoints, its end. Real processes, joined by gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import hasty
import jax
import numpy as np
import pytest
from changes import changed
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster
from jax._src.clusters.slurm_cluster import SlurmCluster

from launch.together import together
from llm_jax import distributed, manifest, records
from llm_jax.config import UserError
from llm_jax.distributed import Place, address, place, variables
from llm_jax.evaluation import standard
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import evaluate
from llm_jax.experiment_file import load_experiment
from llm_jax.inference.opening import open_model
from llm_jax.train import train

SECONDS = 600  # of each command, on a machine that has other work

EXPERIMENT = """
'''A tiny run whose processes note which rows they load, and go as the environment says.'''

import dataclasses, os, signal

import jax

from llm_jax import manifest
from llm_jax.data import Files, Text
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Execution, Run
from llm_jax.sharding import MeshConfig

digest = manifest._digest

def noted(path):
    if "ROWS" in os.environ:
        with open(f"{os.environ['ROWS']}.digests.{jax.process_index()}", "a") as file:
            print(path, file=file)
    return digest(path)

manifest._digest = noted


@dataclasses.dataclass(frozen=True)
class Noting(Text, kind="noting"):
    def open(self):
        source = super().open()
        rows, held = source.rows, source.held_out()
        def note(what, indices):
            if "ROWS" in os.environ:
                with open(f"{os.environ['ROWS']}.{what}.{jax.process_index()}", "a") as file:
                    print(*indices, file=file)
        def trained(seed, indices):
            note("trained", indices)
            process, step, number = map(int, os.environ.get("END", "9 0 0").split())
            if (process, step) == (jax.process_index(), indices[0] // self.batch_size):
                os.kill(os.getpid(), number)
            return rows(seed, indices)
        def scored(indices):
            note("scored", indices)
            return held.rows(indices)
        source.rows = trained
        source.held_out = lambda: dataclasses.replace(held, rows=scored)
        return source


SCALES = ("x",)


def get_config(scale):
    data = Noting(corpus=Files((os.environ["CORPUS"],)), sequence_length=32, batch_size=8)
    execution = Execution(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Transformer(layers=1, width=32, heads=4, vocabulary=264)
    return Run(model, data, AdamW(), tokens=40 * 8 * 32, execution=execution)

"""


@pytest.fixture(scope="module")
def experiment(corpus, tmp_path_factory):
    """The experiment's file, and what its processes need in their environment."""
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "tiny.py"
    file.write_text(textwrap.dedent(EXPERIMENT))
    os.environ["CORPUS"] = corpus
    yield file
    del os.environ["CORPUS"]


@pytest.fixture(scope="module")
def run(experiment):
    module, scale = load_experiment(f"{experiment}:x")
    return module.get_config(scale)


def two(experiment, folder, *arguments, **variables):
    """Trains in two processes of four devices each by the launcher: (exit code, what all said)."""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    four = {"XLA_FLAGS": hasty.flags(devices=4)}
    command = ["-m", "launch.together", "--processes=2", "--", "-m", "llm_jax.train"]
    launcher = subprocess.Popen(
        [sys.executable, *command, f"--config={experiment}:x", f"--folder={folder}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | cache | four | variables,
    )
    try:
        said, _ = launcher.communicate(timeout=SECONDS)
    finally:
        launcher.kill()  # and with it, by the system, the processes that it started
    return launcher.returncode, said


def curve(folder):
    table = records.metrics(folder).set_index("step")
    return table["loss"].to_numpy(), records.load_run(folder)["result"]["loss"]


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The losses on one device, and on eight devices of one process."""
    curves = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        folder = tmp_path_factory.mktemp("alone") / "run"
        fields = {f"execution__mesh__{n}": s for n, s in zip(("data", "fsdp", "tensor"), mesh, strict=True)}
        train(changed(run, **fields), folder)
        curves.append(curve(folder))
    return curves


def test_processes_of_one_machine_meet_without_a_network(monkeypatch):
    def unreachable(*_):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", unreachable, raising=False)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address())


def test_two_processes_give_the_losses_of_one_and_each_loads_its_own_rows(experiment, alone, tmp_path):
    rows = [{"question": f"{a}b", "choices": ["ab", "h e"], "answer": n % 2} for n, a in enumerate("abc")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.json").write_text(json.dumps({"kind": "multiple_choice", "file": "mine.jsonl"}))
    asked = f"--config.execution.tasks.names={tmp_path / 'mine.json'},"
    code, said = two(experiment, tmp_path / "run", asked, ROWS=str(tmp_path / "rows"))
    assert code == 0, said
    assert said.count("status  done") == 1  # process 0 alone speaks
    assert said.count("on 8 cpu, spread over data=2: batch; fsdp=2: batch, embed; tensor=2: heads") == 1
    assert re.search("each holds parameters .* MB, .* MB, in a step, with all of that, [0-9]", said)
    losses, held_out = curve(tmp_path / "run")
    for other, other_held_out in alone:
        np.testing.assert_allclose(losses[:20], other[:20], atol=1e-5)
        assert held_out == pytest.approx(other_held_out, abs=1e-4)
    assert records.starts(tmp_path / "run")[0]["facts"]["environment"]["processes"] == 2
    result = records.load_run(tmp_path / "run")["result"]
    assert result["status"] == "done" and result["steps_done"] == 40
    task = standard.find(str(tmp_path / "mine.json"), tmp_path)
    found = evaluate(Evaluator(open_model(tmp_path / "run")), *task).metrics()["probability"].value
    assert result["mine/probability"] == pytest.approx(found, rel=1e-5)
    for process in range(2):
        for what in ("trained", "scored"):
            lines = (tmp_path / f"rows.{what}.{process}").read_text().splitlines()
            wanted = {int(row) for line in lines if line != "0" for row in line.split()}  # 0 tells the form
            assert {row % 8 // 4 for row in wanted} == {process}
        read = (tmp_path / f"rows.digests.{process}").read_text()
        assert set(re.findall(r"process_(\d+)/", read)) == {str(process)}  # what it wrote itself
    checkpoint = tmp_path / "run" / "checkpoints" / "00000040"
    assert len(manifest.read(checkpoint)["files"]) == sum(path.is_file() for path in checkpoint.rglob("*"))


class Stops:
    def __init__(self, step):
        self.step = step

    def begin(self, step, placed):
        self.began = step

    def update(self, step, loss, tokens_per_second):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_to_one_process_saves_both_at_one_step_and_fewer_devices_continue(
    experiment, run, alone, tmp_path
):
    # Process 1 is asked at step 13; both know, and save, a step or two later.
    code, said = two(experiment, tmp_path / "run", END=f"1 13 {signal.SIGTERM:d}")
    assert code == 143 and "stopped, and saved in" in said, said
    four = Stops(27)
    with pytest.raises(SystemExit):
        train(changed(run, execution__mesh__data=1), tmp_path / "run", progress=four)
    assert 13 <= four.began <= 16
    one = {f"execution__mesh__{name}": 1 for name in ("data", "fsdp", "tensor")}
    last = Stops(-1)
    train(changed(run, **one), tmp_path / "run", progress=last)
    assert 27 <= last.began <= 29
    # Another 20 steps on other layouts, one after the other, from the same state.
    losses, unbroken = curve(tmp_path / "run")[0], alone[0][0]
    assert len(losses) == len(unbroken) == 40
    np.testing.assert_allclose(losses[:36], unbroken[:36], atol=1e-5)


def test_a_killed_process_ends_the_others_with_a_line_and_no_orphan_stays(experiment, tmp_path):
    code, said = two(experiment, tmp_path / "run", END=f"1 13 {signal.SIGKILL:d}")
    assert code == 75, said
    assert "process 1 of 2 was killed by SIGKILL, and the others with it" in said
    assert re.search("process 0 of 2: (another process|process 1) of this run has died or can't be", said)
    assert "Traceback" not in said
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True, text=True)
    assert not left.stdout.split()


def test_what_process_0_refuses_all_refuse(experiment, tmp_path):
    (tmp_path / "metrics").mkdir()
    code, said = two(experiment, tmp_path)
    assert code == 2
    for process in range(2):
        assert f"process {process} of 2: error: {tmp_path} has metrics but no config.json" in said


def test_processes_that_end_well_end_the_launcher_and_a_failure_is_its_own(capfd, monkeypatch):
    monkeypatch.setattr("launch.together.SECONDS_TO_SPEAK", 0.2)
    assert together(["-c", "pass"], 2) == 0
    code = "import os, sys, time; os.environ['LLM_JAX_PROCESS'] == '0' or sys.exit(7); time.sleep(600)"
    assert together(["-c", code], 2) == 7
    assert "process 1 of 2 ended with exit code 7" in capfd.readouterr().err


def test_one_that_hangs_has_the_others_show_where_they_are(capfd, monkeypatch):
    monkeypatch.setattr(distributed, "_others", [])
    here, there = socket.socketpair()
    distributed._listen(here, "process 0")
    distributed._others[:] = [there]
    distributed.ask_where()
    shown = ""
    for _ in range(600):
        shown += capfd.readouterr().err
        if "test_one_that_hangs" in shown:
            break
        time.sleep(0.1)
    there.sendall(b".")
    assert "Thread" in shown and "test_one_that_hangs" in shown


# ---- who is there ----


def test_on_a_cloud_tpu_machine_the_metadata_server_says_who_is_there(monkeypatch):
    """As JAX asks it; here the answers are given in its place."""
    said = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "x:y:127.0.0.1,x:y:127.0.0.2,x:y:127.0.0.3",
    }
    said["tpu-env"] = ""
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(distributed, "tpus", lambda _: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (said[key], 200))
    assert distributed.here() == Place("127.0.0.1:8482", 3, 2)
    said["worker-network-endpoints"] = "x:y:127.0.0.1"
    assert distributed.here() is None

    def unreachable(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    with pytest.raises(UserError, match=r"metadata server doesn't say \(no route\)"):
        distributed.here()


def test_flags_and_environment_say_who_is_there():
    there = Place("host:1234", 4, 3)
    flags = {"coordinator": "host:1234", "processes": 4, "process": 3}
    assert place(flags, {}) == place({}, variables(there)) == there
    assert place(flags | {"process": 0}, variables(there)).process == 0  # flags come first
    assert place({}, {}) is None
    assert place({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "TPU_WORKER_HOSTNAMES": "a"}) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"processes": 2}, "is told by all of --coordinator"),
        ({"coordinator": "h", "processes": 2, "process": 0}, "--coordinator=h .* not --coordinator=HOST"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "they are counted from 0"),
    ],
)  # fmt: skip
def test_half_of_what_is_needed_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        place(flags, {})


@pytest.mark.parametrize("nodes", ["node001", "node001,node7", "node[001-015],other2", "node[001,007-015]"])
def test_slurms_variables_mean_what_jax_reads_in_them(monkeypatch, nodes):
    step = {"JOB_ID": "70123", "STEP_ID": "0", "STEP_NODELIST": nodes, "NTASKS": "8", "PROCID": "5"}
    step |= {"LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_NUM_NODES": "2"}
    step = {f"SLURM_{name}": value for name, value in step.items()}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    found = place({}, step)
    assert SlurmCluster.is_env_present()
    assert found.coordinator == SlurmCluster.get_coordinator_address(1, None)
    assert found.processes == SlurmCluster.get_process_count()
    assert found.process == SlurmCluster.get_process_id()
    assert found.devices == [SlurmCluster.get_local_process_id()]
    assert place({}, step | {"CUDA_VISIBLE_DEVICES": "3"}).devices is None  # bound to each task
    assert place({}, step | {"SLURM_STEP_NUM_NODES": "8"}).devices is None  # a node each


@pytest.mark.parametrize("slices", [1, 2])
def test_a_tpu_slices_variables_mean_what_jax_reads_in_them(monkeypatch, slices):
    # JAX asks the metadata server for what an environment lacks, so this one says all.
    there = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.2,127.0.0.3,127.0.0.4", "TPU_WORKER_ID": "2"}
    there |= {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(slices - 1)}
    there |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    found = place({}, there)
    assert found.coordinator == GkeTpuCluster.get_coordinator_address(1, None) == "localhost:8482"
    assert found.processes == GkeTpuCluster.get_process_count() == 4 * slices
    assert found.process == GkeTpuCluster.get_process_id() == 4 * slices - 2
