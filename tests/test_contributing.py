"""CONTRIBUTING.md's recipes, walked as they stand there."""

import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from llm_jax import config
from llm_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipes():
    """The recipes' names in one namespace, executed in the order of the page."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python name=(\w+)\n(.*?)```", text, re.DOTALL)
    namespace = {"__name__": "recipes"}
    for _, code in blocks:
        exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    assert [name for name, _ in blocks] == ["model", "loss", "experiment", "law"]
    return namespace


def test_the_model_and_the_loss_train_in_the_experiment(recipes, tiny_run, tmp_path):
    base = recipes["get_config"]("smoke")
    runs = recipes["sweep"](base)
    assert len({run.identity() for run in runs}) == 3
    run = config.replace(
        config.replace(runs[2], "data.corpus", tiny_run.data.corpus), "execution.mesh.data", 1
    )
    result = train(run, tmp_path / "run")
    assert result["status"] == "done"
    # Guessing evenly among 257 tokens scores 1 - 1/257.
    assert result["train_loss"] < 0.99
    assert result["N_total"] == 257 * 257


def test_the_law_is_found_by_name_and_recovers_what_made_the_points(recipes):
    from llm_jax.scaling import fits

    D = np.geomspace(1e6, 1e9, 12)
    fit = fits.fit(pd.DataFrame({"D": D, "loss": 1.7 + 300 / D**0.4}), "data_only", bootstrap=0)
    found = {name: estimate.value for name, estimate in fit.parameters.items()}
    assert found["E"] == pytest.approx(1.7, rel=1e-5)
    assert found["B"] == pytest.approx(300, rel=1e-3)
    assert found["beta"] == pytest.approx(0.4, rel=1e-4)


def test_the_task_is_found_beside_its_questions(tmp_path):
    from llm_jax.evaluation import standard

    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = dict(re.findall(r"```json name=(\w+)\n(.*?)```", text, re.DOTALL))
    (tmp_path / "riddles.json").write_text(blocks["task"])
    (tmp_path / "riddles.jsonl").write_text(blocks["questions"])
    _, task, folder = standard.find(str(tmp_path / "riddles.json"), tmp_path)
    assert [task._right(item.record) for item in task.items(folder)] == [0, 1]
