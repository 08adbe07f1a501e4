"""Trunks and branches: steps that runs have in common are computed once, and nothing else changes by that."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from changes import changed

from llm_jax import manifest, records, sharding, trunks
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.program import program, shape_of
from llm_jax.schedules import WSD, Constant, Cosine
from llm_jax.train import train

BATCH = 8 * 32


@pytest.fixture(scope="module")
def wsd(tiny_run):
    """wsd(steps) -> the tiny run with 4 steps of warm-up, the last quarter of its steps a decay."""
    schedule = WSD(decay_fraction=0.25, warmup_steps=4)
    base = changed(tiny_run, optimizer__schedule=schedule, execution__mesh__data=1)
    return lambda steps, **fields: changed(base, tokens=steps * BATCH, **fields)


@pytest.fixture(scope="module")
def forked(wsd, tmp_path_factory):
    """A trunk of 40 steps, a branch of it of 24, the unbroken run of 24, and how many programs they took."""
    root = tmp_path_factory.mktemp("forked")
    program.cache_clear()  # other tests may have this program
    train(
        wsd(40, execution__checkpoint__keep_steps=(19,), execution__evaluate_every_steps=10), root / "trunk"
    )
    train(branch_of(root / "trunk", wsd(24)), root / "branch")
    train(wsd(24), root / "unbroken")
    return root, program.cache_info().misses


def branch_of(trunk, run):
    return changed(run, execution__trunk=str(trunk))


def losses(folder):
    return records.metrics(folder)["loss"].to_numpy()


# ---- what is shared ----


def test_runs_share_their_steps_up_to_the_earlier_decay(wsd):
    # A decay starts at its peak: its first row is still the trunk's.
    assert trunks.shared_steps(wsd(24), wsd(40)) == trunks.shared_steps(wsd(40), wsd(24)) == 19
    assert trunks.shared_steps(wsd(40), wsd(41)) == trunks.extensible_steps(wsd(40)) == 31
    assert trunks.shared_steps(wsd(40), wsd(40, optimizer__schedule__shape="linear")) == 31
    constant = wsd(24, optimizer__schedule=Constant(warmup_steps=4))
    assert trunks.shared_steps(constant, wsd(100)) == 24


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"model__width": 64},
        {"optimizer__learning_rate": 1e-3},
        {"data__batch_size": 4},
        {"optimizer__schedule__warmup_steps": None},
        {"optimizer__schedule": Cosine(warmup_steps=0)},
    ],
    ids=str,
)
def test_runs_that_differ_otherwise_share_nothing(wsd, fields):
    assert trunks.shared_steps(wsd(40), wsd(400, **fields)) <= 1


def test_the_graph_hangs_every_branch_on_the_longest_constant_part(wsd):
    cosine = wsd(80, optimizer__schedule=Cosine(warmup_steps=4))
    foreign = wsd(32, seed=1)
    runs = [wsd(20), wsd(40), wsd(30), wsd(80), cosine, foreign]
    # The cosine run shares its warm-up alone: too little to wait for.
    assert trunks.graph(runs) == {n: trunks.Start(3, s) for n, s in {1: 31, 2: 23, 0: 16}.items()}


def test_the_graph_computes_no_step_twice(wsd):
    shapes = [
        wsd(steps, optimizer__schedule__shape=shape) for steps in (40, 80) for shape in ("linear", "cosine")
    ]
    # A run that decays like another for longer is best begun from that one, not from the trunk.
    early = changed(shapes[0], optimizer__schedule=WSD(decay_fraction=0.5, warmup_steps=4))
    late = changed(early, tokens=80 * BATCH, optimizer__schedule=WSD(decay_fraction=0.75, warmup_steps=4))
    runs = [*shapes, early, late]
    rows = {
        tuple(map(tuple, np.stack(list(trunks._tables(run).values()), 1)[: n + 1]))
        for run in runs
        for n in range(run.steps)
    }
    trained = sum(run.steps for run in runs) - sum(start.from_step for start in trunks.graph(runs).values())
    assert trained == len(rows)


def test_runs_of_a_higher_rank_start_from_lower_ones_only_and_from_what_these_offer(wsd):
    runs = [wsd(80), wsd(40), wsd(20)]
    assert trunks.graph(runs, [1, 0, 1]) == {0: trunks.Start(1, 31), 2: trunks.Start(1, 16)}
    only_at_12 = lambda trunk, step: step if trunk == 0 else 12  # noqa: E731
    assert trunks.graph(runs, [1, 0, 1], only_at_12) == {0: trunks.Start(1, 12), 2: trunks.Start(0, 16)}


def test_a_run_offers_no_state_from_before_its_own_start(wsd):
    complete, longer, shorter = wsd(40), wsd(80), wsd(30)
    standing = {0: (31, 40)}

    def offer(trunk, step):
        return max((at for at in standing[trunk] if at <= step), default=0) if trunk in standing else step

    # Step 23 is gone from the complete run, and the longer one begins at 31.
    assert trunks.graph([complete, longer, shorter], [-1, 0, 0], offer, begun={0}) == {1: trunks.Start(0, 31)}
    # Where the longer one has begun already and keeps the state, it serves all the same.
    standing[1] = (23,)
    found = trunks.graph([complete, longer, shorter], [-1, 0, 0], offer, begun={0, 1})
    assert found == {2: trunks.Start(1, 23)}


def test_runs_on_other_layouts_share_nothing_as_they_round_differently(wsd):
    assert trunks.graph([wsd(80), wsd(40, execution__micro_batches=2)]) == {}


# ---- what a branch computes ----


def test_a_branch_is_bit_for_bit_the_run_that_was_trained_in_one_go(forked, wsd):
    root, _ = forked
    branch, unbroken = root / "branch", root / "unbroken"
    np.testing.assert_array_equal(losses(branch), losses(unbroken))
    assert len(losses(branch)) == 24
    one, other = (records.load_run(folder)["result"] for folder in (branch, unbroken))
    same = (
        "identity",
        "loss",
        "bits_per_byte",
        "train_loss",
        "D",
        "steps",
        "flops_exact",
        "flops_6nd",
        "epochs",
    )
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    states = [Checkpoints(folder / "checkpoints") for folder in (branch, unbroken)]
    abstract = abstract_state(wsd(24))
    (_, one), (_, other) = (checkpoints.restore(abstract, step=24) for checkpoints in states)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def abstract_state(run):
    source, mesh = run.data.open(), sharding.make_mesh(run.execution.mesh)
    with jax.set_mesh(mesh):
        return program(shape_of(run, source), mesh).state


def test_one_program_serves_the_trunk_its_branch_and_the_unbroken_run(forked):
    assert forked[1] == 1


def test_records_say_what_a_branch_shared_and_what_it_spent(forked, wsd):
    root, _ = forked
    trunk, branch, unbroken = (
        records.load_run(root / name)["result"] for name in ("trunk", "branch", "unbroken")
    )
    assert (branch["trunk"], branch["steps_shared"], branch["steps_trained"]) == (trunk["identity"], 19, 5)
    assert (unbroken["trunk"], unbroken["steps_shared"], unbroken["steps_trained"]) == (None, 0, 24)
    assert branch["flops_spent"] == pytest.approx(branch["flops_exact"] * 5 / 24)
    assert unbroken["flops_spent"] == unbroken["flops_exact"] == branch["flops_exact"]
    entry = records.trunk(root / "branch")
    assert entry == {"folder": "../trunk", "identity": trunk["identity"], "from_step": 19, "decay_steps": 5}
    rows = records.metrics(root / "branch")
    assert rows["step"].tolist() == list(range(1, 25))
    assert rows["seconds"].is_monotonic_increasing
    assert branch["wall_seconds"] < rows["seconds"].iloc[-1]
    assert len(losses(root / "trunk")) == 40


def test_the_records_of_a_branch_may_move_with_its_trunk_s(forked, tmp_path):
    shutil.copytree(forked[0], tmp_path / "moved")
    np.testing.assert_array_equal(losses(tmp_path / "moved" / "branch"), losses(forked[0] / "branch"))
    shutil.rmtree(tmp_path / "moved" / "trunk")
    assert records.metrics(tmp_path / "moved" / "branch")["step"].tolist() == list(range(20, 25))


# ---- faults ----


@pytest.fixture
def trunk(forked, tmp_path):
    """A copy of the trunk, to be damaged."""
    return shutil.copytree(forked[0] / "trunk", tmp_path / "trunk")


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_branch_whose_trunk_lost_its_checkpoint_trains_from_the_start_and_says_so(
    forked, trunk, wsd, tmp_path, capfd, damage
):
    if damage == "deleted":
        shutil.rmtree(trunk / "checkpoints" / "00000019")
        (trunk / "checkpoints" / "00000019.json").unlink()
    else:
        victim = max((trunk / "checkpoints" / "00000019").rglob("*"), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
    result = train(branch_of(trunk, wsd(24)), tmp_path / "branch")
    assert "no checkpoint of its first 19 steps" in capfd.readouterr().err
    assert (result["trunk"], result["steps_shared"]) == (None, 0)
    assert result["flops_spent"] == result["flops_exact"]
    np.testing.assert_array_equal(losses(tmp_path / "branch"), losses(forked[0] / "unbroken"))


def test_a_branch_starts_from_an_earlier_checkpoint_where_the_wanted_one_is_missing(wsd, forked, tmp_path):
    run = wsd(40, execution__checkpoint__keep_steps=(12,))
    train(run, tmp_path / "trunk")
    result = train(branch_of(tmp_path / "trunk", wsd(24)), tmp_path / "branch")
    assert result["steps_shared"] == 12
    np.testing.assert_array_equal(losses(tmp_path / "branch"), losses(forked[0] / "unbroken"))


def test_a_killed_branch_continues_from_its_own_checkpoint(forked, trunk, wsd, tmp_path):
    def killed(step, params):
        while manifest.steps(tmp_path / "branch" / "checkpoints")[-1:] != [21]:  # its save is under way
            time.sleep(0.01)
        raise KeyboardInterrupt

    run = branch_of(trunk, wsd(24, execution__checkpoint__every_steps=1))
    with pytest.raises(KeyboardInterrupt):
        train(changed(run, execution__evaluate_every_steps=22), tmp_path / "branch", [killed])
    shutil.rmtree(trunk / "checkpoints")
    result = train(run, tmp_path / "branch")
    assert [start["resume_at"] for start in records.starts(tmp_path / "branch")] == [19, 21]
    assert (result["steps_shared"], result["steps_trained"]) == (19, 5)
    np.testing.assert_array_equal(losses(tmp_path / "branch"), losses(forked[0] / "unbroken"))


@pytest.mark.parametrize("fields", [{"seed": 1}, {"model__layers": 3}], ids=str)
def test_a_trunk_of_another_run_is_refused_before_anything_is_written(forked, wsd, tmp_path, fields):
    with pytest.raises(UserError, match="has no first step in common"):
        train(branch_of(forked[0] / "trunk", wsd(24, **fields)), tmp_path / "branch")
    with pytest.raises(UserError, match="no run here"):
        train(branch_of(tmp_path / "nowhere", wsd(24)), tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_a_trunk_whose_tokens_another_version_made_is_refused(trunk, wsd, tmp_path):
    there = json.loads((trunk / "config.json").read_text())
    there["data"]["tokenizer"]["library"] = "bytes 0.9"
    (trunk / "config.json").write_text(json.dumps(there))
    with pytest.raises(UserError, match=r"its tokens were made by bytes 0\.9"):
        train(branch_of(trunk, wsd(24)), tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_a_run_that_is_wholly_its_trunk_s_is_scored_without_a_step(forked, wsd, tmp_path):
    keep = {"execution__checkpoint__keep_steps": (24,)}
    train(wsd(40, **keep), tmp_path / "trunk")
    run = branch_of(tmp_path / "trunk", wsd(24, optimizer__schedule=Constant(warmup_steps=4)))
    result = train(run, tmp_path / "branch")
    assert (result["status"], result["steps_shared"], result["steps_trained"]) == ("done", 24, 0)
    assert result["flops_spent"] == 0 and np.isfinite(result["loss"])
    np.testing.assert_array_equal(losses(tmp_path / "branch"), losses(tmp_path / "trunk")[:24])
    assert Checkpoints(tmp_path / "branch" / "checkpoints").steps() == [24]
