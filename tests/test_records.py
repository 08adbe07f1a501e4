import concurrent.futures
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import files, records
from llm_jax.config import UserError
from llm_jax.environment import environment, git_revision
from llm_jax.files import dumps
from llm_jax.records import Record, load_run, load_sweep, metrics

CONFIG = {
    "identity": "abc",
    "schema": 1,
    "scientific": {"model": {"kind": "transformer", "layers": 6}},
    "config": {"model": {"kind": "transformer", "layers": 6, "width": 64}, "seed": 3, "betas": [0.9, 0.95]},
    "cell": {"role": "fit", "budget_flops": 1e15},
}
FACTS = {"git_revision": "f00"}


def started(folder, resume_at=0, **kwargs):
    record = Record(folder, tensorboard=False, **kwargs)
    record.start(CONFIG, FACTS)
    record.resume_at(resume_at)
    return record


def test_a_run_is_written_and_read(tmp_path):
    with started(tmp_path) as record:
        record.log(1, {"loss": jnp.float32(2.5), "rate": np.int64(3)})
        record.log(2, {"loss": 2.25})
        record.log(2, {"held_out/loss": 2.0})
        assert load_run(tmp_path)["status"] == "running"
        record.finish({"status": "done", "loss": 2.0})
    run = load_run(tmp_path)
    assert run["status"] == "done" and run["result"] == {"status": "done", "loss": 2.0}
    assert run["config"] == CONFIG["config"] and run["git_revision"] == "f00"
    table = metrics(tmp_path)
    assert table["step"].tolist() == [1, 2] and table["loss"].tolist() == [2.5, 2.25]
    assert table["held_out/loss"].tolist()[1] == 2.0 and math.isnan(table["held_out/loss"][0])


def test_rows_past_the_restored_step_are_dropped_and_later_values_win(tmp_path):
    with started(tmp_path) as record:
        for step in range(1, 11):
            record.log(step, {"loss": 1.0, "first": step})
    with started(tmp_path, resume_at=6) as record:
        record.log(7, {"loss": 2.0})
    with started(tmp_path, resume_at=6) as record:
        record.log(7, {"loss": 3.0})
        record.log(8, {"loss": 3.0})
    table = metrics(tmp_path)
    assert table["step"].tolist() == list(range(1, 9))
    assert table["loss"].tolist() == [1.0] * 6 + [3.0] * 2
    assert table["first"].isna().tolist() == [False] * 6 + [True] * 2
    assert [start["resume_at"] for start in records.starts(tmp_path)] == [0, 6, 6]
    assert records.starts(tmp_path)[2]["facts"] == FACTS


def test_a_restart_from_nothing_drops_all_rows(tmp_path):
    with started(tmp_path) as record:
        record.log(5, {"loss": 1.0})
    with started(tmp_path):
        pass
    assert len(metrics(tmp_path)) == 0 and "step" in metrics(tmp_path)


def test_a_half_written_last_line_is_ignored(tmp_path):
    with started(tmp_path) as record:
        record.log(1, {"loss": 1.0})
        record.log(2, {"loss": 2.0})
    part = tmp_path / "metrics" / "00000.jsonl"
    whole = part.read_bytes()
    for length in range(whole.rindex(b'{"step": 2'), len(whole)):
        part.write_bytes(whole[:length])
        assert metrics(tmp_path)["step"].tolist() == [1]


def test_a_new_part_begins_after_so_many_rows_and_at_each_start(tmp_path):
    with started(tmp_path, rows_per_part=2) as record:
        for step in range(1, 6):
            record.log(step, {"loss": step})
    with started(tmp_path, resume_at=5) as record:
        record.log(6, {"loss": 6})
    names = sorted(path.name for path in (tmp_path / "metrics").iterdir())
    assert names == ["00000.jsonl", "00001.jsonl", "00002.jsonl", "00003.jsonl"]
    assert metrics(tmp_path)["loss"].tolist() == [1, 2, 3, 4, 5, 6]


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    with started(tmp_path) as record:
        record.log(1, {"loss": jnp.float32("nan"), "x": math.inf, "y": np.float32("-inf")})
        texts = ["NaN", "-Infinity", "\\Infinity", "Infinity war", "\\"]
        record.finish({"status": "diverged", "loss": math.nan, "nested": {"x": [math.inf]}, "texts": texts})

    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    for path in [tmp_path / "result.json", *(tmp_path / "metrics").iterdir()]:
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=strict)
    result = load_run(tmp_path)["result"]
    assert math.isnan(result["loss"]) and result["nested"]["x"] == [math.inf]
    assert result["texts"] == texts  # a text that reads like a number stays one
    row = metrics(tmp_path).iloc[0]
    assert math.isnan(row.loss) and row.x == math.inf and row.y == -math.inf
    assert math.isnan(load_sweep(tmp_path)["loss"][0])


def test_floats_are_written_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    with started(tmp_path) as record:
        for step, value in enumerate(values):
            record.log(step, {"loss": jnp.asarray(value)})
    assert np.array_equal(metrics(tmp_path)["loss"].to_numpy(np.float32), values)


def test_another_config_is_refused_with_both_identities_and_the_first_difference(tmp_path):
    started(tmp_path).close()
    before = sorted(tmp_path.rglob("*"))
    other = CONFIG | {"identity": "def", "scientific": {"model": {"kind": "transformer"}}}
    other["config"] = {"model": {"kind": "transformer", "layers": 4}}
    with pytest.raises(UserError) as error:
        Record(tmp_path).start(other, FACTS)
    assert "run abc, not def: model.layers is 6 there and 4 here" in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    clipped = [CONFIG | {"identity": name, "scientific": {"clip": math.inf, "name": name}} for name in "gh"]
    Record(tmp_path / "clipped", tensorboard=False).start(clipped[0], FACTS)
    with pytest.raises(UserError, match="name is 'g' there and 'h' here"):
        Record(tmp_path / "clipped").start(clipped[1], FACTS)
    with pytest.raises(UserError, match="schema is 1 there and 2 here"):
        Record(tmp_path).start(CONFIG | {"identity": "def", "schema": 2}, FACTS)


@pytest.mark.parametrize("left", ["result.json", "checkpoints"])
def test_what_is_left_of_a_run_without_its_config_belongs_to_nobody(tmp_path, left):
    started(tmp_path).close()
    (tmp_path / "config.json").rename(tmp_path / left)
    with pytest.raises(UserError, match=rf"has {left} but no config.json, so nothing says whose it is"):
        started(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{"])
def test_a_damaged_result_is_one_line(tmp_path, content):
    started(tmp_path).close()
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result\.json(: not a JSON object| is no result)"):
        load_run(tmp_path)


def test_a_run_whose_tokens_another_version_made_is_refused(tmp_path):
    def of(version):
        made = {"kind": "sentencepiece", "fingerprint": "f00", "library": f"sentencepiece {version}"}
        return CONFIG | {"data": {"tokenizer": made}}

    for _ in range(2):
        with Record(tmp_path, tensorboard=False) as record:
            record.start(of("1.0"), FACTS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=r"made by sentencepiece 1.0 \(f00\), and here .* by sentencepiece 1.1"
    ):
        Record(tmp_path).start(of("1.1"), FACTS)
    assert sorted(tmp_path.rglob("*")) == before
    with Record(tmp_path, tensorboard=False) as record:
        record.start(CONFIG, FACTS)  # data that has no tokenizer, or a record of before they were told


WRITER = """
import sys, time
from llm_jax.records import Record
record = Record(sys.argv[1], tensorboard=False)
record.start({"identity": "abc"}, {})
record.resume_at(0)
step = 0
print("ready", flush=True)
while True:
    step += 1
    record.log(step, {"loss": step / 3})
"""


def test_a_run_in_use_is_refused_and_free_again_after_a_kill(tmp_path):
    """And the killed writer's rows are there, each of them whole."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "ready\n"
    assert load_run(tmp_path)["status"] == "running"
    with pytest.raises(UserError, match="another process"):
        started(tmp_path)
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert load_run(tmp_path)["status"] == "missing"
    table = metrics(tmp_path)
    assert len(table) > 0 and table["step"].tolist() == list(range(1, len(table) + 1))
    started(tmp_path, resume_at=len(table)).close()


def test_looking_at_a_run_does_not_set_it_free(tmp_path):
    with started(tmp_path):
        assert load_run(tmp_path)["status"] == "running"
        program = f"from llm_jax.records import load_run; print(load_run({str(tmp_path)!r})['status'])"
        look = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert look.stdout == "running\n"


def test_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    record = started(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        record.finish({"status": "done"})
    record.close()
    assert not (tmp_path / "result.json").exists() and load_run(tmp_path)["status"] == "missing"


def test_of_many_who_write_one_file_at_once_all_succeed_and_one_is_last(tmp_path):
    place, texts = tmp_path / "plan.json", [str(number) * 10_000 for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write_atomically(place, text), texts * 20))
    assert place.read_text() in texts
    assert list(tmp_path.iterdir()) == [place]


def test_other_processes_of_a_run_write_nothing(tmp_path):
    record = started(tmp_path, writes=False)
    record.log(1, {"loss": 1.0})
    record.finish({"status": "done"})
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_one_table_with_the_unfinished_runs_in_it(tmp_path):
    for number in range(3):
        with started(tmp_path / "runs" / f"{number:03d}") as record:
            if number != 1:
                record.finish({"status": "done", "loss": 3.0 - number, "seed": 3})
    with started(tmp_path / "runs" / "003"):
        (tmp_path / "runs" / "report").mkdir()
        table = load_sweep(tmp_path)
    assert table["run"].tolist() == ["runs/000", "runs/001", "runs/002", "runs/003"]
    assert table["status"].tolist() == ["done", "missing", "done", "running"]
    assert table["loss"].isna().tolist() == [False, True, False, True]
    assert set(table["model.width"]) == {64} and set(table["budget_flops"]) == {1e15}
    assert set(table["role"]) == {"fit"} and table["betas"][0] == (0.9, 0.95)
    assert load_sweep(tmp_path / "runs" / "002")["loss"].tolist() == [1.0]


def test_a_thousand_runs_load_in_a_moment(tmp_path):
    for number in range(1000):
        folder = tmp_path / f"{number:04d}"
        folder.mkdir()
        (folder / "config.json").write_text(dumps(CONFIG))
        (folder / "result.json").write_text(dumps({"status": "done", "loss": number / 7}))
    begin = time.perf_counter()
    table = load_sweep(tmp_path)
    assert len(table) == 1000 and table["loss"].tolist() == [number / 7 for number in range(1000)]
    assert time.perf_counter() - begin < 5  # a quarter of a second on an idle core


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no runs here"):
        load_sweep(tmp_path)
    with pytest.raises(UserError, match="no run here"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a JSON object"):
        load_run(tmp_path)


def test_reading_records_imports_no_jax():
    program = "import sys, llm_jax.records; sys.exit('jax' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_environment_names_versions_device_and_revision():
    facts = environment()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= facts["versions"].keys()
    assert all(facts["versions"].values()) and facts["device"] == "cpu"
    assert json.loads(dumps(facts)) == facts
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("+dirty")) == 40


# ---- TensorBoard events ----


def test_tensorboard_shows_the_rows_that_count(tmp_path):
    """As its own reader accumulates them, which drops steps that a later start computes again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_at, loss in ((0, 2.5), (3, 2.25)):
        with Record(tmp_path) as record:
            record.start(CONFIG, FACTS)
            record.resume_at(resume_at)
            for step in range(resume_at + 1, resume_at + 6):
                record.log(step, {"loss": jnp.float32(loss), "x": math.nan if step < 5 else 1.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in shown.Scalars("loss")]
    assert losses == [(1, 2.5), (2, 2.5), (3, 2.5), *((step, 2.25) for step in range(4, 9))]
    assert [event.step for event in shown.Scalars("x")] == [5, 6, 7, 8]


def test_a_record_with_events_imports_neither_torch_nor_tensorflow(tmp_path):
    program = (
        "import sys; from llm_jax.records import Record\n"
        "with Record(sys.argv[1]) as record:\n"
        "    record.start({'identity': 'abc'}, {})\n"
        "    record.log(1, {'loss': 2.5})\n"
        "sys.exit(bool({'torch', 'tensorflow', 'jax'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 0
    assert any((tmp_path / "tensorboard").iterdir())


def test_weights_and_biases_is_told_the_same_by_the_name_of_the_identity(tmp_path, monkeypatch):
    """Their package is replaced by one that records what it is asked."""
    asked, told = {}, []
    run = types.SimpleNamespace(
        log=lambda row, step: told.append((step, row)), finish=lambda: told.append("end")
    )
    stub = types.ModuleType("wandb")
    stub.init = lambda **how: asked.update(how) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with Record(tmp_path, tensorboard=False, wandb="mine") as record:
        record.start(CONFIG, {})
        record.resume_at(0)
        record.log(1, {"loss": 2.0, "scale": math.inf})
    assert (asked["project"], asked["id"], asked["resume"]) == ("mine", CONFIG["identity"], "allow")
    assert told == [(1, {"loss": 2.0}), "end"]
