"""Disks that fill up, and folders that vanish: a failure of the run alone, and no loss of what stands."""

import re
import shutil
import subprocess
import threading

import pytest
from test_local import bits, changed, plan_of, trained, wait_for, where_workers_find_things

from llm_jax import claims, config, records
from llm_jax.train import train

__all__ = ["bits", "where_workers_find_things"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, and how to make it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, text=True
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
