"""Disks that fill up, folders that turn read-only or vanish: a failure of the run alone, and no loss."""

import errno
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from test_local import bits, changed, plan_of, trained, wait_for, where_workers_find_things

from llm_jax import claims, config, records
from llm_jax.checkpoints import Checkpoints
from llm_jax.train import train

__all__ = ["bits", "where_workers_find_things"]


@pytest.fixture
def small_disk(tmp_path, request):
    """A disk of its own, of 64 kB if nobody says otherwise, and how to make it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', '64k')}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk of its own can be made here: {mounted.stderr.strip()}")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_fails_the_run_and_it_goes_on_where_there_is_room_again(bits, tmp_path, small_disk):
    disk, enlarge = small_disk
    run = config.replace(bits.get_config("small"), "execution.checkpoint.every_steps", 10)
    plan = plan_of(disk / "runs", run)
    (reason,) = trained(plan).values()
    assert re.search(r"No space left on device.*, 3 times at step \d+$", reason)
    enlarge()
    assert trained(plan) == {}
    undisturbed = train(run, tmp_path / "undisturbed")
    assert records.load_run(plan.runs[0].folder)["result"]["train_loss"] == undisturbed["train_loss"]


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_disk_on_which_arrays_alone_find_no_room_is_full_like_any_other(small_disk, caplog):
    """Arrays are written by a library that knows no OSError."""
    disk, enlarge = small_disk
    checkpoints = Checkpoints(disk / "checkpoints")
    state = {"x": np.random.default_rng(0).random((1000, 1000))}
    checkpoints.save(1, {"x": np.zeros(9)}, wait=True)
    checkpoints.save(2, state)
    with pytest.raises(OSError, match="No space left on device") as full:
        checkpoints.wait()
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(disk / "checkpoints" / "00000002")
    assert "RESOURCE_EXHAUSTED" in str(full.value.__cause__)
    assert not caplog.records
    enlarge()
    checkpoints.save(2, state, wait=True)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


@pytest.fixture
def freeze(tmp_path):
    """Turns a folder read-only (True) or not (False), for root too and for whoever has its files open."""

    def turn(folder, frozen):
        flag = "+i" if frozen else "-i"
        return subprocess.run(["chattr", "-R", flag, folder], capture_output=True, text=True)

    if (tried := turn(tmp_path, True)).returncode:
        pytest.skip(f"no folder can be made read-only for its owner here: {tried.stderr.strip()}")
    turn(tmp_path, False)
    yield turn
    turn(tmp_path, False)


def test_a_folder_that_turns_read_only_fails_its_run_which_goes_on_once_it_can_write(bits, tmp_path, freeze):
    run = config.replace(bits.get_config("small"), "execution.checkpoint.every_steps", 10)
    plan = plan_of(tmp_path / "runs", changed(run, seconds=0.05))
    folder = plan.runs[0].folder

    def turn():
        wait_for(lambda: any((folder / "checkpoints").glob("*.json")))
        freeze(folder, True)

    thread = threading.Thread(target=turn)
    thread.start()
    (reason,) = trained(plan).values()
    thread.join()
    assert re.search(r"Operation not permitted.*, 3 times at step \d+$", reason)
    freeze(folder, False)
    assert trained(plan) == {}
    undisturbed = train(run, tmp_path / "undisturbed")
    assert records.load_run(folder)["result"]["train_loss"] == undisturbed["train_loss"]


def test_a_run_whose_folder_vanishes_begins_anew_and_ends_as_undisturbed(bits, tmp_path, capsys):
    run = config.replace(bits.get_config("small"), "execution.checkpoint.every_steps", 0)
    plan = plan_of(tmp_path / "runs", changed(run, seconds=0.05))
    vanishing = plan.runs[0].folder

    def vanish():
        wait_for(lambda: claims.owner(vanishing).get("step", 0) > 1)
        shutil.rmtree(vanishing)

    thread = threading.Thread(target=vanish)
    thread.start()
    assert trained(plan) == {}
    thread.join()
    assert re.search("the folder has gone.*; try 2 of 3", capsys.readouterr().err)
    undisturbed = train(run, tmp_path / "undisturbed")
    assert records.load_run(vanishing)["result"]["train_loss"] == undisturbed["train_loss"]
