"""Who has a run: one of all who try, on a disk and in a bucket, whatever dies, sleeps or turns its clock."""

import concurrent.futures
import errno
import json
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest

from llm_jax import buckets, claims, manifest
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import HeldOut
from llm_jax.held_out import by_document
from llm_jax.records import Record
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.store import store
from llm_jax.values import AGAIN


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 0.6)
    monkeypatch.setattr(claims, "_seen", {})


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def claimed_elsewhere(folder, **sign):
    """A claim of another machine, which has given one sign."""
    number = claims._last(store(f"{folder}/claims")) + 1
    there = store(f"{folder}/claims")
    there.create(f"{number:05d}", json.dumps({"machine": "another", "pid": 1, "born": "1"}).encode())
    there.write(f"{number:05d}.sign", json.dumps({"beat": 1, **sign}).encode())
    return there, f"{number:05d}.sign"


def test_of_many_who_try_at_once_one_has_the_run(folder):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: claims.take(folder), range(8)))
    (winner,) = filter(None, taken)
    assert claims.held(folder) and claims.take(folder) is None
    winner.release()
    assert not claims.held(folder)
    claims.take(folder).release()
    assert store(f"{folder}/claims").names() == ["00000", "00000.sign", "00001", "00001.sign"]


def test_a_name_whose_upload_is_repeated_as_its_answer_was_lost_is_one_s_own(bucket, monkeypatch):
    there, files = store(f"{bucket}/{uuid.uuid4().hex}"), buckets._store()
    pipe_file = files.pipe_file

    def repeated(path, data, mode):
        if there.read("00000") is None:
            pipe_file(path, data)
        raise FileExistsError(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "pipe_file", repeated)
        assert there.create("00000", b"mine")
        assert not there.create("00000", b"theirs")


def test_an_owner_elsewhere_keeps_its_run_by_signs_and_loses_it_by_silence(folder, monkeypatch):
    """By no clock but the looker's monotonic one: all others jump at every look."""
    days = iter(range(10**6, -(10**6), -1))
    monkeypatch.setattr(time, "time", lambda: 86400.0 * next(days))
    there, name = claimed_elsewhere(folder)
    stop = threading.Event()

    def signs():
        beat = 1
        while not stop.wait(0.1):
            there.write(name, json.dumps({"beat": (beat := beat + 1)}).encode())

    living = threading.Thread(target=signs)
    living.start()
    assert claims.take(folder) is None
    stop.set()
    living.join()
    begun = time.monotonic()
    claims.take(folder).release()
    assert time.monotonic() - begun > 0.4


def test_an_owner_that_slept_past_its_lease_writes_no_more(tmp_path):
    sleeper = claims.take(tmp_path)
    claimed_elsewhere(tmp_path)
    sleeper.beat()
    assert sleeper.lost
    before = store(tmp_path / "claims").read("00000.sign")
    sleeper.release()
    assert store(tmp_path / "claims").read("00000.sign") == before


def test_an_owner_past_its_lease_writes_no_checkpoint_and_no_result(tmp_path):
    """It is asked before each of them, whatever its heartbeat has seen so far."""
    state = {"x": np.zeros(3, np.float32)}
    record = Record(tmp_path, tensorboard=False)
    record.start({"identity": "a"}, {})
    record.resume_at(0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", confirm=record.confirm)
    checkpoints.save(1, state, wait=True)
    claimed_elsewhere(tmp_path)
    with pytest.raises(UserError, match="another process has taken this run over"):
        checkpoints.save(2, state, wait=True)
    with pytest.raises(UserError, match="another process has taken this run over"):
        record.finish({"status": "done"})
    assert checkpoints.steps() == [1]
    assert not (tmp_path / "result.json").exists()


def test_an_owner_whose_signs_cannot_be_written_ends_before_others_may_take_its_run(tmp_path, monkeypatch):
    claim = claims.take(tmp_path)
    monkeypatch.setattr(claim._store, "write", unwritable := Unwritable(claim._store.write))
    claim.move(1)
    time.sleep(0.75 * claims.LEASE)
    with pytest.raises(OSError, match=r"no sign can be written .503"):
        claim.move(2)
    unwritable.well = True  # a process that was stopped, say: nobody took its run meanwhile
    claim.move(3)
    claim.release()


def test_a_process_that_could_not_sign_its_claim_may_try_again(folder, monkeypatch):
    """At its beginning or at its end: it lives, but it doesn't have the run."""
    there = type(store(folder))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(there, "write", full)
        claims.take(folder)
    assert not claims.held(folder)
    claim = claims.take(folder)
    assert claims.held(folder) and claims.take(folder) is None
    with monkeypatch.context() as patch:
        patch.setattr(there, "write", full)
        claim.release()
    assert not claims.held(folder)
    claims.take(folder).release()


class Unwritable:
    """A bucket's library raises errors of its own, which are no OSError."""

    def __init__(self, write):
        self.write, self.well, self.asked = write, False, 0

    def __call__(self, *given):
        self.asked += 1
        if not self.well:
            raise RuntimeError("503")
        self.write(*given)


def test_a_heart_beats_on_after_any_error(tmp_path, monkeypatch):
    claim = claims.take(tmp_path)
    monkeypatch.setattr(claims, "BEAT", 0.02)
    monkeypatch.setattr(claim._store, "write", unwritable := Unwritable(claim._store.write))
    threading.Thread(target=claims._beat_all, daemon=True).start()
    wait_for(lambda: unwritable.asked > 1)
    unwritable.well, before = True, claims.owner(tmp_path)["beat"]
    wait_for(lambda: claims.owner(tmp_path)["beat"] > before)
    claim.release()


def test_deaths_count_while_they_are_at_one_place_and_nobody_forgave_them(tmp_path):
    for step in (0, 20, 20):
        claimed_elsewhere(tmp_path, **{"from": step})
    assert claims.deaths(tmp_path) == (2, 20)
    claims.forgive(tmp_path)  # by a process that can't know yet whether the last owner is dead
    assert claims.deaths(tmp_path) == (0, 0)
    claimed_elsewhere(tmp_path, **{"from": 20})
    assert claims.deaths(tmp_path) == (1, 20)


def test_what_is_done_beside_steps_is_movement_too(tmp_path):
    claim = claims.take(tmp_path / "run")
    batch = {"tokens": np.ones((2, 3)), "mask": np.ones((2, 3)), "document": np.zeros((2, 3), int)}
    held_out = HeldOut(lambda chosen: {name: x[chosen] for name, x in batch.items()}, 2, 6, 9, 1)
    mesh = make_mesh(MeshConfig(data=1))
    for part in (
        lambda: manifest.digests(tmp_path),
        lambda: by_document(lambda params, rows: rows["tokens"], {}, held_out, 2, mesh),
    ):
        claim.still = 99.0
        part()
        assert claim.still < 99
    claim.release()


HANGS = """
import sys, threading
from llm_jax import buckets, claims
claims.BEAT = 0.05
claims.leave_when_still(0.2, lambda: print("the others show where they are", flush=True))
claim = claims.take(sys.argv[1])
claim._store.names = threading.Event().wait  # a store that never answers
def in_a_collective_that_never_ends():
    threading.Event().wait()
in_a_collective_that_never_ends()
"""


def test_a_process_that_hangs_though_its_store_does_too_says_where_and_asks_to_be_started_again(tmp_path):
    hung = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True)
    assert hung.returncode == AGAIN
    assert "in_a_collective_that_never_ends" in hung.stderr
    assert hung.stdout == "the others show where they are\n"
    assert not claims.held(tmp_path)
