"""The trainer: the same losses however it is executed, killed or continued; a record of whatever happens."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import changed

from llm_jax import claims, config, facts, loop, member, optimizers, records, sharding
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import HeldOut
from llm_jax.held_out import score
from llm_jax.member import has_diverged
from llm_jax.models import Output, Role, Term
from llm_jax.models.transformer import LayerNorm
from llm_jax.program import Program
from llm_jax.step import State, accumulate, make_init, make_step, state_shardings
from llm_jax.train import train


def losses(folder):
    return records.metrics(folder)["loss"].to_numpy()


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """The tiny run trained once on one device: its folder and result."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = train(changed(tiny_run, execution__mesh__data=1), folder)
    return folder, result


def test_a_run_learns_and_its_result_says_what_analysis_needs(finished, tiny_run):
    folder, result = finished
    assert result["status"] == "done"
    # Logits of deviation 1 cost half a nat beside guessing evenly.
    assert losses(folder)[0] == pytest.approx(np.log(257) + 0.5, abs=0.3)
    assert losses(folder)[-1] < 3.2
    assert abs(result["loss"] - losses(folder)[-5:].mean()) < 0.3
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] / np.log(2) * result["held_out_tokens"] / result["held_out_bytes"]
    )
    assert 0 < result["loss_standard_error"] < 0.1
    assert result["D"] == result["steps"] * tiny_run.data.tokens_per_step == 40 * 8 * 32
    assert result["identity"] == tiny_run.identity()
    assert json.loads((folder / "result.json").read_text())["loss"] == result["loss"]


@pytest.mark.parametrize("documents", [1, 2])
def test_the_standard_error_is_that_of_several_documents(documents):
    nats = np.float32([[1.0, 2.0], [3.0, 6.0]])
    document = np.int32([[0, 0], [1, 1]]) % documents
    batch = {"document": document, "mask": np.ones((2, 2), np.float32), "nats": nats}
    rows = lambda chosen: {name: x[chosen] for name, x in batch.items()}  # noqa: E731
    held_out = HeldOut(rows, count=2, tokens=4, bytes=8, documents=documents)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    [scores] = score(lambda params, batch: batch["nats"], {}, held_out, 2, mesh)
    assert scores["loss"] == 3.0
    # The documents' sums lie 3 below and above what the mean says: sqrt(2 (9 + 9) / 4^2).
    assert scores.get("loss_standard_error") == (None if documents == 1 else pytest.approx(1.5))


def test_a_finished_run_is_not_trained_again(finished, tiny_run):
    folder, result = finished
    before = sorted(p.name for p in (folder / "metrics").iterdir())
    again = train(changed(tiny_run, execution__mesh__data=1), folder)
    assert again["loss"] == result["loss"]
    assert sorted(p.name for p in (folder / "metrics").iterdir()) == before


VOCABULARY = 264  # which two and four devices divide, as 257 they don't


@pytest.fixture(scope="module")
def alone(tiny_run, tmp_path_factory):
    """Its first steps with that vocabulary on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(changed(tiny_run, model__vocabulary=VOCABULARY, execution__mesh__data=1), folder)
    return folder


@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"slice": 2, "sequence": 4}],
    ids=str,
)
def test_eight_devices_give_the_losses_of_one(alone, tiny_run, tmp_path, mesh):
    fields = {f"execution__mesh__{name}": size for name, size in ({"data": 1} | mesh).items()}
    train(changed(tiny_run, model__vocabulary=VOCABULARY, **fields), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run")[:20], losses(alone)[:20], atol=1e-5)
    spread = records.starts(tmp_path / "run")[0]["facts"]["kept_whole"]
    assert not any("embed" in name for name in spread)


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batches": 4},
        {"layout__unroll": False, "layout__remat": "full"},
        {"layout__attention": "reference"},
        {"mesh__member": 2},
    ],
    ids=str,
)
def test_how_a_run_is_executed_does_not_change_its_losses(finished, tiny_run, tmp_path, fields):
    fields = {f"execution__{name}": value for name, value in fields.items()}
    run = changed(tiny_run, execution__mesh__data=1, **fields)
    train(run, tmp_path / "run")
    assert run.identity() == tiny_run.identity()
    assert records.starts(tmp_path / "run")[0]["facts"]["layout"]["mesh"]["member"] == 1
    np.testing.assert_allclose(losses(tmp_path / "run")[:20], losses(finished[0])[:20], atol=1e-5)


def test_what_is_written_on_the_way_does_not_change_a_run(finished, tiny_run, tmp_path):
    fields = {"log_every_steps": 7, "evaluate_every_steps": 3, "checkpoint__every_steps": 11}
    fields = {f"execution__{name}": value for name, value in fields.items()}
    result = train(changed(tiny_run, execution__mesh__data=1, **fields), tmp_path / "run")
    assert result["loss"] == finished[1]["loss"]
    table = records.metrics(tmp_path / "run").set_index("step")
    assert list(table["loss"].dropna().index) == [1, 7, 14, 21, 28, 35, 40]
    assert list(table["held_out/loss"].dropna().index) == list(range(3, 40, 3))


def test_accumulated_gradients_are_those_of_the_big_batch_with_uneven_masks():
    key = jax.random.PRNGKey(0)
    batch = {
        "x": jax.random.normal(key, (8, 5)),
        "mask": (jnp.arange(8)[:, None] >= jnp.arange(5)).astype(float),
    }

    def terms_of(params, batch, key):
        values = jnp.tanh(batch["x"] * params["w"])
        squares = Term((values**2 * batch["mask"]).sum(), batch["mask"].sum(), 1.0)
        return {"squares": squares, "rows": Term(values.sum(), jnp.float32(len(values)), 0.1)}

    params = {"w": jnp.linspace(0.1, 1.0, 5)}
    whole, whole_terms = accumulate(terms_of, params, batch, key, 1)
    for micro_batches in (2, 4, 8):
        parts, terms = accumulate(terms_of, params, batch, key, micro_batches)
        np.testing.assert_allclose(parts["w"], whole["w"], atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), terms, whole_terms)


def test_frozen_parameters_are_used_and_stay(tiny_run):
    source = tiny_run.data.open()
    model = tiny_run.resolved_model.build()
    key = jax.random.PRNGKey(0)
    params = model.init(key)
    names = sorted(params)
    frozen = {names[0]: params[names[0]]}
    trained = {name: params[name] for name in names[1:]}
    roles = model.roles(params)
    roles = {name: roles[name] for name in names[1:]}
    tables = optimizers.tables(tiny_run.optimizer, tiny_run.objective, 10)
    state = State(trained, frozen, optimizers.init(tiny_run.optimizer, roles, trained), jnp.int32(0), key)
    step = jax.jit(make_step(model, tiny_run.objective, tiny_run.optimizer, roles))
    for i in range(5):
        state, _ = step(state, source.rows(0, np.arange(8)), {k: v[i] for k, v in tables.items()})
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    assert all(
        (a != b).any() for a, b in zip(jax.tree.leaves(state.trained), jax.tree.leaves(trained), strict=True)
    )


def low_rank(base):
    """`base` frozen, and a trained product of two thin matrices added to its hidden states."""

    def init(key):
        return {"low_rank": {"down": 0.1 * jax.random.normal(key, (32, 2)), "up": jnp.zeros((2, 32))}}

    def apply(params, batch, key):
        hidden, aux = base.apply(params, batch, key)
        return Output(hidden + hidden @ params["low_rank"]["down"] @ params["low_rank"]["up"], aux)

    def roles(params):
        thin = {
            "down": Role("down", ("embed", None), decay=True),
            "up": Role("up", (None, "embed"), decay=True),
        }
        return base.roles({k: v for k, v in params.items() if k != "low_rank"}) | {"low_rank": thin}

    return dataclasses.replace(base, init=init, apply=apply, roles=roles)


@pytest.fixture
def low_rank_steps(tiny_run):
    """low_rank_steps(**mesh) -> (the places of the state, its first losses) of a low-rank model."""
    source, base = tiny_run.data.open(), tiny_run.resolved_model.build()
    model, key, optimizer = low_rank(base), jax.random.PRNGKey(0), tiny_run.optimizer
    frozen, trained = base.init(key), model.init(key)
    roles = model.roles(frozen | trained)
    own = {"low_rank": roles["low_rank"]}
    tables = optimizers.tables(optimizer, tiny_run.objective, 10)
    step = make_step(model, tiny_run.objective, optimizer, own)

    def steps(**sizes):
        mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
        state = State(trained, frozen, optimizers.init(optimizer, own, trained), jnp.int32(0), key)
        places = state_shardings(state, roles, mesh)
        state, compiled, found = (
            jax.device_put(state, places),
            jax.jit(step, out_shardings=(places, None)),
            [],
        )
        with jax.set_mesh(mesh):
            for i in range(5):
                batch = jax.device_put(source.rows(0, np.arange(8) + 8 * i), sharding.batch_sharding(mesh))
                state, metrics = compiled(state, batch, {name: table[i] for name, table in tables.items()})
                found.append(float(metrics["loss"]))
        return places, found

    return steps


def test_a_frozen_base_is_spread_by_its_own_roles_and_trains_as_on_one_device(low_rank_steps):
    places, losses_ = low_rank_steps(data=1, fsdp=4, tensor=2)
    mixer = places.frozen["body"]["0"]["mixer"]
    assert mixer["query"].spec == jax.P(None, "fsdp", "tensor", None)
    assert mixer["out"].spec == jax.P(None, "tensor", None, "fsdp")
    assert places.frozen["embed"]["embedding"].spec == jax.P(None, "fsdp")  # 257 rows don't divide
    assert places.trained["low_rank"]["down"].spec == jax.P("fsdp", None)
    moments = {leaf.spec for leaf in jax.tree.leaves(places.optimizer)}
    assert moments == {jax.P(), jax.P("fsdp", None), jax.P(None, "fsdp")}
    _, alone = low_rank_steps(data=1)
    assert losses_[0] != losses_[-1]
    np.testing.assert_allclose(losses_, alone, atol=1e-5)


def test_seeds_change_the_initialisation_and_the_order(tiny_run):
    model, source = tiny_run.resolved_model.build(), tiny_run.data.open()
    roles = model.roles(jax.eval_shape(model.init, jax.random.PRNGKey(0)))
    init = make_init(model, tiny_run.optimizer, roles)
    a, b = (jax.tree.leaves(init(jax.random.PRNGKey(seed)).trained) for seed in (0, 1))
    assert any((x != y).any() for x, y in zip(a, b, strict=True))
    assert (source.rows(0, np.arange(8))["tokens"] != source.rows(1, np.arange(8))["tokens"]).any()


def test_a_diverging_run_ends_with_a_record_that_says_so(tiny_run, tmp_path):
    run = changed(tiny_run, optimizer__learning_rate=1e30, optimizer__clip_norm=float("inf"))
    result = train(changed(run, execution__mesh__data=1), tmp_path / "run")
    assert result["status"] == "diverged"
    assert records.load_run(tmp_path / "run")["status"] == "diverged"
    steps = len(losses(tmp_path / "run"))
    assert steps < 40 and records.how_it_ended(result) == f"diverged at step {steps} of 40"


def test_a_vocabulary_larger_than_the_datas_is_no_divergence(tiny_run, tmp_path):
    run = changed(tiny_run, execution__mesh__data=1, tokens=2 * 8 * 32, model__vocabulary=50_000)
    result = train(run, tmp_path)
    assert result["status"] == "done" and result["loss"] > 1.5 * np.log(257)


def test_a_run_whose_loss_grows_without_overflowing_has_diverged_too(tiny_run, tmp_path):
    run = changed(tiny_run, optimizer__learning_rate=30.0, execution__mesh__data=1)
    result = train(run, tmp_path / "run")
    assert result["status"] == "diverged"
    assert "loss" not in result


def test_one_odd_batch_is_no_divergence_and_a_loss_that_stays_high_is():
    usual, level = [5.6, 5.2, 4.9, 4.7, 4.5], 5.6
    for place in range(5):
        odd = [*usual[:place], 1e6, *usual[place + 1 :]]
        assert not any(has_diverged(odd[: n + 1], level) for n in range(1, 5))
    assert has_diverged([5.6, 5.2, 1e3, 1e4, 1e5], level)
    assert has_diverged([5.6, math.nan], level) and has_diverged([math.inf], level)


def test_weights_that_the_last_step_breaks_are_noticed(tiny_run, tmp_path):
    run = changed(tiny_run, optimizer__learning_rate=3e38, model__norm=LayerNorm(), tokens=8 * 32)
    run = changed(run, execution__mesh__data=1)
    result = train(run, tmp_path / "run")
    assert result["steps"] == 1 and np.isfinite(losses(tmp_path / "run")).all()
    assert result["status"] == "diverged"


def test_evaluation_during_training_calls_hooks_and_is_logged(tiny_run, tmp_path):
    seen = []

    def hook(step, params):
        seen.append(step)
        return {"probe": float(step)}

    train(
        changed(tiny_run, execution__mesh__data=1, execution__evaluate_every_steps=15),
        tmp_path / "run",
        [hook],
    )
    assert seen == [15, 30, 40]
    table = records.metrics(tmp_path / "run").set_index("step")
    assert table["held_out/probe"].dropna().to_dict() == {15: 15.0, 30: 30.0}
    assert table["held_out/loss"].dropna().is_monotonic_decreasing


# ---- killed and continued ----


def test_a_run_that_continues_on_another_number_of_cores_says_so(finished, tiny_run, tmp_path, capfd):
    run = changed(tiny_run, execution__mesh__data=1)
    for cores, said in ((records.starts(finished[0])[0]["facts"]["cores"], 0), (97, 1)):
        folder = shutil.copytree(finished[0], tmp_path / str(cores))
        (folder / "result.json").unlink()
        part = folder / "metrics" / "00000.jsonl"
        part.write_text(re.sub(r'"cores": \d+', f'"cores": {cores}', part.read_text()))
        train(run, folder)
        assert capfd.readouterr().err.count("its state is of 97 cores, and here are ") == said


SCRIPT = """
import sys, json
from llm_jax import config
from llm_jax.run import Run
from llm_jax.train import train
run = config.from_json(Run, json.loads(open(sys.argv[1]).read()))
train(run, sys.argv[2])
"""


def start(run, folder, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(config.to_json(run)))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run.json"), str(folder)]
    as_users_compile = os.environ | {"XLA_FLAGS": ""}
    return subprocess.Popen(command, env=as_users_compile, stderr=subprocess.PIPE)


def wait_for_step(folder, step, process):
    while process.poll() is None:
        if (folder / "metrics").is_dir() and (records.metrics(folder)["step"] >= step).any():
            return
        time.sleep(0.01)
    raise AssertionError(process.stderr.read().decode())


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tiny_run, tmp_path):
    """By SIGKILL first, then by SIGTERM."""
    run = changed(tiny_run, tokens=150 * 8 * 32, execution__checkpoint__every_steps=7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(run, whole, tmp_path).wait() == 0
    for step, kill, code in ((20, signal.SIGKILL, -9), (80, signal.SIGTERM, 143)):
        process = start(run, killed, tmp_path)
        wait_for_step(killed, step, process)
        process.send_signal(kill)
        assert process.wait() == code
        assert not (killed / "result.json").exists()
    assert start(run, killed, tmp_path).wait() == 0
    assert [s["resume_at"] > 0 for s in records.starts(killed)] == [False, True, True]
    np.testing.assert_array_equal(losses(killed), losses(whole))
    results = [records.load_run(folder)["result"] for folder in (whole, killed)]
    assert results[0]["loss"] == results[1]["loss"]


# ---- what can't be done ----


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 10**9}, "tokens are more than the"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it lies in 0 .. 4294967295"),
        ({"execution__mesh__data": 16}, "needs 16 devices, and there are 8"),
        ({"execution__mesh__tensor": 3}, "does not divide the 8 devices"),
        (
            {"data__batch_size": 12, "execution__mesh__data": 8},
            r"a batch of 12 rows \(data.batch_size\) doesn\'t divide over 8 devices",
        ),
        ({"execution__mesh__data": 1, "execution__micro_batches": 3}, "3 micro-batches"),
        ({"model__heads": 5}, "heads"),
        ({"model__width": 10**6}, r" GB of parameters, .* and this machine has "),
        ({"model__layers": 10**7}, "lower --config.model.width or --config.model.layers"),
        ({"model__layers": "x"}, "config.model.layers: 'x' is not an integer"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate"),
        ({"execution__checkpoint__keep_last": 0}, "keep_last is 0; it is at least 1"),
        ({"model__dropout": 0.1, "execution__micro_batches": 2}, "dropout draws anew"),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_refused_before_anything_is_written(tiny_run, tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        train(changed(tiny_run, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_process_has_is_left_before_its_checkpoints_are_read(
    finished, tiny_run, tmp_path, monkeypatch
):
    """Their owner prunes them meanwhile; and nothing is compiled for nothing."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    claim = claims.take(tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "restore", lambda *_, **__: pytest.fail("they are read"))
    with pytest.raises(UserError, match="another process is running this run"):
        train(tiny_run, tmp_path / "run")
    claim.release()


def test_a_folder_of_another_run_is_refused(finished, tiny_run):
    with pytest.raises(UserError, match=r"belongs to run .*: model.layers is 2 there and 3 here"):
        train(changed(tiny_run, model__layers=3, execution__mesh__data=1), finished[0])


# ---- the loop and its clocks ----


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_it_are_fetched(
    tiny_run, tmp_path, monkeypatch
):
    events, compiled = [], Program.step

    def logged(program):
        def step(*arguments):
            events.append("dispatch")
            return compiled.fget(program)(*arguments)

        return step

    def fetch(tree):
        events.append("fetch")
        return device_get(tree)

    device_get = jax.device_get
    monkeypatch.setattr(Program, "step", property(logged))
    monkeypatch.setattr(loop.jax, "device_get", fetch)
    train(changed(tiny_run, execution__mesh__data=1, tokens=4 * 8 * 32), tmp_path)
    assert events[:7] == ["dispatch", "dispatch", "fetch", "dispatch", "fetch", "dispatch", "fetch"]


def test_compiling_evaluating_and_saving_are_not_in_the_rate(monkeypatch):
    now = iter([0.0, 1000.0, 1002.0, 1004.0, 2000.0, 2001.0])
    monkeypatch.setattr(facts.time, "perf_counter", lambda: next(now))
    watch = facts.Stopwatch(tokens_per_step=10)
    next(now)  # compiling
    assert [watch.lap(), watch.lap(), watch.lap(2)] == [0.0, 5.0, 7.5]
    watch.restart()
    assert [watch.lap(), watch.lap()] == [7.5, 8.0]


def test_a_pack_on_many_devices_is_measured_by_the_peak_of_them_all(tiny_run):
    class Device:
        device_kind, platform = "NVIDIA H100 80GB HBM3", "gpu"

    class Mesh:
        devices, size = np.array([Device(), Device()]), 2

    run = changed(tiny_run, model__dtype="bfloat16")
    numbers = {"flops_exact_per_token": 1e9, "tokens_per_second": 1e5, "members": 4}
    speeds = facts.speeds(numbers, run, Mesh())
    assert speeds["flops_per_second"] == 1e14
    assert speeds["mfu"] == pytest.approx(4 * 1e14 / (2 * 989.4e12), rel=1e-2)
    assert facts.speeds(numbers | {"flops_exact_per_token": None}, run, Mesh())["mfu"] is None


class Stops:
    """A run's progress that asks for the end, as SIGTERM does: at a step, or before the first (None)."""

    def __init__(self, step):
        self.step = step

    def begin(self, step, notes):
        if self.step is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def update(self, step, loss, tokens_per_second):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_asked_to_stop_before_its_first_step_makes_none(tiny_run, tmp_path):
    with pytest.raises(SystemExit):
        train(changed(tiny_run, execution__mesh__data=1), tmp_path, progress=Stops(None))
    assert not len(records.metrics(tmp_path)) and not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_continued_run_is_judged_by_the_losses_that_the_unbroken_one_is_judged_by(
    tiny_run, tmp_path, monkeypatch
):
    judged = {}
    monkeypatch.setattr(member, "has_diverged", lambda latest, level: seen.append((tuple(latest), level)))
    run = changed(tiny_run, execution__mesh__data=1, execution__log_every_steps=4)
    for name, stops in (("whole", [-1]), ("continued", [23, -1])):
        for stop in stops:
            seen = judged[name] = []
            with pytest.raises(SystemExit) if stop > 0 else contextlib.nullcontext():
                train(run, tmp_path / name, progress=Stops(stop))
    later = judged["continued"]
    assert 10 < len(later) < 20 and later == judged["whole"][-len(later) :]
