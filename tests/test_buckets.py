"""Run folders in a bucket: all that a folder of a disk does, though objects can't be added to, nor locked."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import uuid

import hasty
import jax
import numpy as np
import pytest
from changes import changed

from launch import status, worker
from llm_jax import buckets, config, files, manifest, records
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.inference.opening import open_model
from llm_jax.parts import Parts

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(sys.path),
    "XLA_FLAGS": hasty.flags(devices=1),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
}


@pytest.fixture
def folder(bucket):
    """A folder of its own, in which nothing is yet."""
    return files.path(bucket, uuid.uuid4().hex)


TRAIN = """
import sys, json
from llm_jax import config, experiment_file
from llm_jax.run import Run
from llm_jax.train import train
run = config.from_json(Run, json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    train(run, folder)
"""


def start(run, *folders):
    command = [sys.executable, "-c", TRAIN, json.dumps(config.to_json(run)), *map(str, folders)]
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT)


@pytest.mark.slow
def test_a_run_killed_in_a_bucket_continues_with_the_losses_of_one_on_a_disk(tiny_run, folder, tmp_path):
    """Bit for bit, though it is killed between two parts of its metrics."""
    run = changed(tiny_run, tokens=150 * 8 * 32, execution__checkpoint__every_steps=20)
    process = start(run, folder)
    while not any(step >= 40 for step in manifest.steps(folder / "checkpoints")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stood = max(manifest.steps(folder / "checkpoints"))
    assert records.metrics(folder)["step"].max() >= stood
    assert start(run, tmp_path / "run", folder).wait() == 0
    assert [begun["resume_at"] for begun in records.starts(folder)] == [0, stood]
    ours, theirs = records.metrics(folder), records.metrics(tmp_path / "run")
    np.testing.assert_array_equal(ours["loss"], theirs["loss"])
    result = records.load_run(folder)["result"]
    assert result["loss"] == records.load_run(tmp_path / "run")["result"]["loss"]
    assert any((folder / "tensorboard").glob("events*"))
    params = [jax.tree.leaves(open_model(str(place)).params) for place in (folder, tmp_path / "run")]
    assert all((one == other).all() for one, other in zip(*params, strict=True))
    [row] = records.load_sweep(folder.parent).query("run == @folder.name").itertuples()
    assert row.status == "done" and row.loss == result["loss"]


SWEEP = f"""
from matplotlib.figure import Figure
from llm_jax import experiment_file
from llm_jax.scaling.page import Page, show
clusters, _ = experiment_file.load_experiment({str(ROOT / "tests" / "launch" / "clusters.py")!r})
SCALES, get_config, sweep = clusters.SCALES, clusters.get_config, clusters.sweep

def hooks(run):
    print("trained:", run.name)
    return []

def report(base, folder, runs, forecasts):
    show(folder, Page("Four runs", figures=[("drawn", "nothing", Figure(figsize=(1, 1)))]))
    return dict(zip(runs["name"], runs["train_loss"]))
"""


@pytest.mark.slow
def test_a_sweep_in_a_bucket_ends_as_one_on_a_disk(folder, tmp_path):
    """With trunks and branches, by two workers; its plan, logs, table, report and figures are there too."""
    (tmp_path / "four.py").write_text(SWEEP)

    def launch(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        ended = subprocess.run(
            command, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    sweep = "launch.local", f"--config={tmp_path / 'four.py'}:branches", "--workers=2", "--pack=off"
    for place in (tmp_path / "runs", folder):
        said = launch(*sweep, f"--folder={place}")
        assert f"report: {place}/report.html" in said
    results = [json.loads((place / "result.json").read_text()) for place in (tmp_path / "runs", folder)]
    assert "seed-1-60" in results[0] and results[0] == results[1]
    runs = records.load_sweep(folder).set_index("name")
    assert runs.loc["seed-1-60", "steps_shared"] == 49
    assert runs.loc["seed-1-60", "trunk"] == runs.loc["seed-1", "identity"]
    branch = folder / runs.loc["seed-1-60", "run"]
    assert records.metrics(branch)["step"].tolist() == list(range(1, 61))
    assert (folder / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert (branch / "log.txt").read_text() == "trained: seed-1-60\n"
    assert "4/4 runs done" in launch("launch.status", f"--folder={folder}")
    assert "all of it is complete" in launch(*sweep, f"--folder={folder}")


def test_a_changed_or_missing_object_of_a_checkpoint_is_noticed_and_the_one_before_serves(folder):
    """By what the store knows of its objects: none is read."""
    said = []
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=3, say=said.append)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": np.full(4, step, np.float32)}, wait=True)
    places = [folder / "checkpoints" / f"{step:08d}" for step in (1, 2, 3)]
    data = next(iter((places[1] / "state" / "d").glob("*")))
    data.write_bytes(data.read_bytes()[::-1])
    (places[2] / "state" / "manifest.ocdbt").unlink()
    step, state = checkpoints.restore({"x": np.zeros(4, np.float32)})
    assert step == 1 and (np.asarray(state["x"]) == 1).all()
    assert "00000003 (state/manifest.ocdbt is missing), 00000002 (state/d/" in said[0]
    assert "has changed" in said[0]
    checkpoints.close()
    again = Checkpoints(folder / "checkpoints")
    again.restore({"x": np.zeros(4, np.float32)})
    again.save(2, {"x": np.zeros(4, np.float32)}, wait=True)
    again.close()
    assert manifest.steps(folder / "checkpoints") == [1, 2]
    assert not places[2].exists()


def test_the_status_of_a_run_takes_few_requests_and_those_of_a_sweep_are_made_at_once(folder, monkeypatch):
    runs = [
        {"identity": f"{n}", "label": f"{n}", "price": 1.0, "steps": 9, "from_step": 0} for n in range(30)
    ]
    (folder / "plan.json").write_text(json.dumps({"runs": runs}))
    for n in range(20):
        (folder / f"{n}" / "config.json").write_text("{}")
        (folder / f"{n}" / "result.json").write_text('{"status": "done", "wall_seconds": 1}')
    asked, ask = [], buckets.BucketPath._ask

    def asking(self, *given, **options):
        asked.append(self)
        time.sleep(0.1)
        return ask(self, *given, **options)

    monkeypatch.setattr(buckets.BucketPath, "_ask", asking)
    assert status.line(status.rows(folder)).startswith("20/30 runs done, 10 waiting")
    assert len(asked) == 1 + 20 * 2 + 10 * 4
    begun = time.perf_counter()
    status.rows(folder)
    assert time.perf_counter() - begun < 81 * 0.1 / 2


def test_paths_in_buckets_are_used_as_those_of_disks(folder, tmp_path):
    for place in (folder, tmp_path / "x"):
        place.mkdir(parents=True, exist_ok=True)
        assert not any(place.glob("*")) and not (place / "a").exists()
        (place / "a").write_text("one")
        files.write_atomically(place / "b" / "c" if files.in_bucket(place) else place / "c", "two")
        assert (place / "a").read_text() == "one" and (place / "a").exists()
        with pytest.raises(FileNotFoundError) as missing:
            (place / "none").read_bytes()
        assert missing.value.strerror and "none" in str(missing.value.filename)
        (place / "none").unlink(missing_ok=True)
        with files.filled(place / "drawn") as drawn:
            (drawn / "p.png").parent.mkdir(exist_ok=True)
            (drawn / "p.png").write_bytes(b"png")
        assert [path.name for path in (place / "drawn").iterdir()] == ["p.png"]
        assert place / "drawn" in files.folders(place)
        files.remove(place / "drawn")
        assert not (place / "drawn").exists()
    assert files.path(folder, "../x/y") == folder.parent / "x" / "y"
    assert files.relative(folder.parent / "x", folder) == "../x"
    assert files.path(folder, files.relative(tmp_path, folder)) == tmp_path


def test_what_is_removed_twice_or_by_another_one_is_removed(folder, monkeypatch):
    """A request whose answer was lost is repeated by gcsfs, and finds nothing."""
    store = buckets._store()
    rm_file = store.rm_file

    def repeated(path):
        rm_file(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(store, "rm_file", repeated)
    files.check_writable(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    for step in (1, 2):
        checkpoints.save(step, {"x": np.zeros(3)}, wait=True)
    checkpoints.close()
    assert manifest.steps(folder / "checkpoints") == [2]
    assert sorted(path.name for path in files.folders(folder / "checkpoints")) == ["00000002"]


def test_what_is_neither_a_folder_nor_a_bucket_is_refused_in_one_line():
    for place in ("s3://runs/x", "gs://", "memory://x"):
        with pytest.raises(UserError, match=r"folders are on a disk or in a bucket, gs://bucket/name"):
            files.path(place)


@pytest.fixture
def silent(monkeypatch):
    """A store that takes connections and answers none, at which no request waits long."""
    pytest.importorskip("gcsfs")
    with socket.create_server(("127.0.0.1", 0)) as server, monkeypatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.getsockname()[1]}")
        patch.setattr(buckets, "SECONDS_TO_ANSWER", 0.3)
        buckets._opened.cache_clear()
        yield server
    buckets._opened.cache_clear()


def test_where_a_bucket_cannot_be_looked_at_nobody_says_that_it_holds_no_plan(silent, caplog):
    for reason in ("no answer within", "127.0.0.1:[0-9]+ can't be reached .Connection refused"):
        begun = time.monotonic()
        with pytest.raises(OSError, match=reason) as error:
            status.rows(files.path("gs://nosuch/xx"))
        assert error.value.filename == "gs://nosuch/xx/plan.json" and error.value.strerror
        assert time.monotonic() - begun < 10
        silent.close()
        buckets._opened.cache_clear()
    assert not caplog.records


def test_a_writer_whose_part_another_one_made_writes_no_part_after_it(folder):
    """The next number is the other one's, which would be refused in turn."""
    parts = Parts(folder, {})
    (folder / "00001.jsonl").write_text("theirs")
    for _ in range(3):
        with pytest.raises(FileExistsError):
            parts.add({"step": 1})
            parts.flush()
    parts.close()
    assert [path.name for path in folder.iterdir()] == ["00000.jsonl", "00001.jsonl"]
    assert (folder / "00001.jsonl").read_text() == "theirs"


def test_a_part_that_could_not_be_uploaded_comes_before_those_after_it(folder, monkeypatch):
    """Whole and as it was: the upload may have been made, and its answer lost."""
    parts, upload, lost = Parts(folder, {}), buckets.BucketPath.create_bytes, [False, True]

    def fails(self, data):
        if lost:
            if lost.pop():
                upload(self, data)
            raise TimeoutError("no answer")
        upload(self, data)

    monkeypatch.setattr(buckets.BucketPath, "create_bytes", fails)
    parts.add({"step": 1})
    for give in (parts.flush, lambda: parts.add({"step": 2})):
        with pytest.raises(TimeoutError):
            give()
    parts.add({"step": 3})
    parts.close()
    rows = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
    assert [row.get("step", "part") for row in rows] == ["part", "part", 1, "part", 3]


def test_what_a_worker_prints_after_a_run_has_no_hole_before_it(folder, capfd):
    """Its launcher reads why it died there, and a follower's goes to the bucket as it is."""
    os.write(1, b"before")
    for text in ("first", "second"):
        with worker.logging_in([folder]):
            print(text, end="", flush=True)
        os.write(1, b"after")
        assert os.pread(1, 99, 0) == b"after"
    assert (folder / "log.txt").read_text() == "firstsecond"
