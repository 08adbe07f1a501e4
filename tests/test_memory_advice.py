"""When memory runs out: the advice is followed, and XLA says that it was right."""

import dataclasses
import pathlib
import re

import jax
import pytest

from llm_jax import config, experiment_file
from llm_jax.config import UserError
from llm_jax.kernels import advice, memory
from llm_jax.pack import mesh_of
from llm_jax.program import program, shape_of
from llm_jax.train import train

BITS = pathlib.Path(__file__).parent / "launch" / "bits.py"


def test_the_number_of_micro_batches_that_is_advised_fits(monkeypatch):
    bits = experiment_file.load_experiment(str(BITS))[0]
    run = dataclasses.replace(bits.get_config("small"), model=bits.Classifier(width=4096))
    run = config.replace(run, "data.batch_size", 1024)
    mesh = mesh_of(run, width=1)
    whole = program(shape_of(run, run.data.open()), mesh)
    kept, between = whole.memory_parts
    room = kept + 0.3 * between
    monkeypatch.setattr(memory, "room", lambda mesh: room)
    with pytest.raises(UserError, match=r"a step needs .*micro_batches=\d+") as refused:
        whole.step  # noqa: B018
    advised = int(re.search(r"micro_batches=(\d+)", str(refused.value))[1])
    run = config.replace(run, "execution.micro_batches", advised)
    assert program(shape_of(run, run.data.open()), mesh).memory_bytes <= room < whole.memory_bytes


def test_a_state_that_is_too_large_is_to_be_spread():
    knobs = advice.advice(kept=30e9, between=1e9, room=10e9, rows=8, micro_batches=1, remat="full")
    assert "mesh.fsdp=4 " in knobs and "micro" not in knobs and "remat" not in knobs


def test_a_run_that_memory_runs_out_in_leaves_a_profile_and_advice(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nat ...")

    run = experiment_file.load_experiment(str(BITS))[0].get_config("small")
    monkeypatch.setattr("llm_jax.loop.InFlight.put", full)
    with pytest.raises(UserError, match=r"^RESOURCE_EXHAUSTED.* bytes\.; to fit, --config\.execution\.micro"):
        train(run, tmp_path)
    assert (tmp_path / advice.PROFILE).stat().st_size > 0
