"""The command: a table, result.json, and one line for what a user can get wrong."""

import json

import pytest

EXAMPLES = [{"query": f"the rain {n}", "choices": ["in spain", "again"], "gold": n % 2} for n in range(6)]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "copa.jsonl.xz").write_bytes(b"")
    lines = "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    (tmp_path / "mine.jsonl").write_text(lines)
    task = {"kind": "multiple_choice", "file": "mine.jsonl", "question": "{query}", "answer": "gold"}
    (tmp_path / "mine.json").write_text(json.dumps(task))
    written = {"kind": "generation", "file": "mine.jsonl", "question": "{query}", "answer": "{query}"}
    (tmp_path / "written.json").write_text(json.dumps(written | {"max_tokens": 4}))
    return tmp_path


@pytest.fixture
def evaluate(command, saved, data, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(data / "cache"))
    return lambda *flags: command("llm_jax.evaluate", f"--model={saved}", f"--data={data}", *flags)


def test_a_table_and_a_result_that_machines_read(evaluate, data):
    tasks = f"--tasks={data}/mine.json,{data}/written.json"
    code, out, err = evaluate(tasks, "--chat", "--few_shot=1", f"--out={data}/out")
    assert code in (0, None) and "error" not in err, err
    result = json.loads((data / "out" / "result.json").read_text())
    mine = result["tasks"]["mine"]
    assert mine["format"] == {"chat": True, "few_shot": 1} and mine["items"] == 6
    value = mine["metrics"]["accuracy"]
    assert set(value) == {"value", "standard_error", "count"} and 0 <= value["value"] <= 1
    assert f"mine     chat, 1 shots  accuracy           {value['value']:.4f}" in out
    items = [json.loads(line) for line in (data / "out" / "mine.jsonl").read_text().splitlines()]
    assert sum(item["scores"]["accuracy"][0] for item in items) / 6 == pytest.approx(value["value"])
    again = evaluate(tasks, "--chat", "--few_shot=1", f"--out={data}/again")[1]
    assert again == out
    assert (data / "again" / "result.json").read_text() == (data / "out" / "result.json").read_text()


def test_a_standard_error_that_nobody_knows_is_left_out_and_null(evaluate, data):
    code, out, err = evaluate(f"--tasks={data}/mine.json", "--limit=1", f"--out={data}/one")
    assert code in (0, None) and "nan" not in out, err
    found = json.loads((data / "one" / "result.json").read_text())["tasks"]["mine"]["metrics"]
    assert {metric["standard_error"] for metric in found.values()} == {None}


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--model and --tasks are needed"),
        (["--tasks=arc_eazy"], "did you mean 'arc_easy'"),
        (["--tasks=arc_easy"], "--data=DIR names the folder"),
        (["--tasks={}/mine.json", "--limit=0"], "--limit and --slots are at least 1"),
        (["--tasks={}/mine.json", "--mesh=rows=2"], "'rows' is not data=N, fsdp=N or tensor=N"),
        (["--tasks={}/mine.json", "--few_shot=6"], "6 records, which give no 6 examples for each"),
        (["--tasks=copa"], "copa.jsonl.xz"),
        (["--tasks={}/mine.json", "--out={}/mine.json"], "mine.json is a file: name a folder"),
    ],
)
def test_mistakes_are_one_line(evaluate, data, flags, message):
    code, out, err = evaluate(*[flag.format(data) for flag in flags])
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_ctrl_c_says_that_the_same_command_continues(evaluate, data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_jax.evaluation.runner.Evaluator.run", interrupted)
    code, out, err = evaluate(f"--tasks={data}/mine.json")
    assert code == 130 and err.endswith("stopped; the same command continues\n") and not out


def test_the_published_tasks_are_listed(command):
    code, out, _ = command("llm_jax.evaluate", "--tasks=help")
    assert code in (0, None) and "arc_easy" in out and "gsm8k" in out and "arithmetic:tool" in out
