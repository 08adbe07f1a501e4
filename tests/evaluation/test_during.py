"""A run is asked tasks while it trains, and the state that answered best is kept and opened."""

import dataclasses
import json

import jax
import pytest

from llm_jax.data import Files, Text
from llm_jax.evaluation import runner, standard
from llm_jax.evaluation.during import Asking
from llm_jax.evaluation.runner import Evaluator
from llm_jax.evaluation.scores import evaluate
from llm_jax.inference.opening import open_model
from llm_jax.models.transformer import Transformer
from llm_jax.records import metrics
from llm_jax.run import Execution, Run, Tasks


@pytest.fixture
def flags(corpus, tmp_path):
    """A command that trains for twelve steps and asks after every fourth."""
    rows = [
        {"question": f"{a}b c", "choices": ["ab", "hg e"], "answer": n % 2} for n, a in enumerate("abcdef")
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.json").write_text(json.dumps({"kind": "multiple_choice", "file": "mine.jsonl"}))
    fields = {
        "model.width": 16, "model.layers": 1, "model.heads": 1, "data.corpus": corpus, "tokens": 12 * 256,
        "data.sequence_length": 64, "data.batch_size": 4, "execution.mesh.data": 1,
        "execution.block_steps": 4, "execution.evaluate_every_steps": 4,
        "execution.tasks.names": f"{tmp_path / 'mine.json'},",
        "execution.checkpoint.keep_best": "mine/probability",
    }  # fmt: skip
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["llm_jax.train", "--config=experiments/isoflop.py:smoke", f"--folder={tmp_path / 'run'}", *given]


def test_the_state_with_the_best_metric_of_a_task_is_kept_and_opened(flags, tmp_path, command):
    task = standard.find(str(tmp_path / "mine.json"), tmp_path)
    code, _, err = command(*flags)
    assert not code, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    logged = metrics(tmp_path / "run").set_index("step")["held_out/mine/probability"].dropna()
    said = {**logged, 12: result["mine/probability"]}
    assert list(said) == [4, 8, 12] and len({*said.values()}) == 3
    best = max(said, key=said.get)
    assert result["best"] == {"metric": "mine/probability", "step": best, "value": said[best]}
    found = evaluate(Evaluator(open_model(tmp_path / "run")), *task).metrics()["probability"].value
    assert found == pytest.approx(said[best], rel=1e-5)


def test_asking_hashes_no_parameters_and_reads_no_data_again(corpus, monkeypatch):
    data = Text(corpus=Files((corpus,)), sequence_length=64, batch_size=4)
    run = Run(Transformer(layers=1, width=16, heads=1), data, tokens=256)
    run = dataclasses.replace(run, execution=Execution(tasks=Tasks(("arithmetic",), limit=1)))
    asking, params = Asking(run, data.open()), run.resolved_model.build().init(jax.random.key(0))
    monkeypatch.setattr(Text, "open", None)
    monkeypatch.setattr(runner, "content", None)
    assert asking.metrics["arithmetic/accuracy"] == "highest"
    assert set(asking(1, params)) == set(asking(2, params)) == {"arithmetic/accuracy"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--config.execution.tasks.names={}/half.json,"], "half.jsonl: line 2 has no field 'answer'"),
        (["--config.execution.tasks.names=leters,"], "no task 'leters'; did you mean 'letters'"),
        (["--config.execution.tasks.limit=0"], "execution.tasks.limit is 0; it is at least 1"),
    ],
)
def test_a_task_that_is_not_there_is_one_line(flags, tmp_path, command, changes, words):
    (tmp_path / "half.json").write_text('{"kind": "completion", "file": "half.jsonl", "answer": "{answer}"}')
    (tmp_path / "half.jsonl").write_text('{"context": "a", "answer": "b"}\n{"context": "a"}\n')
    code, _, err = command(*flags, *[change.format(tmp_path) for change in changes])
    assert code == 2 and words in err.rpartition("\r")[2] and not (tmp_path / "run").exists()
