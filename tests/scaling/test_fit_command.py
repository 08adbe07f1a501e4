"""The command: a table in, a law and fit.json out; one line and exit code 2 for what a user got wrong."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from known_laws import TRUTH, sweep
from test_options import curves

from llm_jax.scaling.results import Estimate, row

READ = ("--points=POINTS", "--columns=N=params")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llm_jax.scaling.fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def points(tmp_path):
    path = tmp_path / "points.csv"
    sweep(noise=0.002).rename(columns={"N": "params"}).to_csv(path, index=False)
    return path


def test_a_table_becomes_a_law_with_predictions_and_a_json(points, tmp_path):
    given = f"--fix=E={TRUTH['E']},alpha={TRUTH['alpha']}"
    asked = ("--predict=C=1e23", "--predict=N=1e10,D=1e11", "--bootstrap=100", "--where=C > 1e17")
    done = run(f"--points={points}", "--columns=N=params", given, *asked, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "L = E + A/N^alpha + B/D^beta" in done.stdout and "fixed" in done.stdout
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    beta = content["parameters"]["beta"]
    assert beta["low"] < TRUTH["beta"] < beta["high"]
    asked = [set(prediction) for prediction in content["predictions"]]
    assert asked == [{"at", "N", "D", "loss"}, {"at", "loss", "loss, one run"}]
    assert content["sensitivity"][0]["change"] == "as fitted" and content["leave_largest_out"]["runs"] == 7
    assert content["conventions"]["columns"] == {"N": "params"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fit.json", "frontier.png", "optima.png", "residuals.png"
    }  # fmt: skip
    table, values = sweep(noise=0.002), {name: e["value"] for name, e in content["parameters"].items()}
    for told, N, D, loss in zip(content["runs"], table["N"], table["D"], table["loss"], strict=True):
        law = values["E"] + values["A"] / N ** values["alpha"] + values["B"] / D ** values["beta"]
        assert (told["N"], told["D"], told["loss"]) == pytest.approx((N, D, loss), rel=1e-12)
        assert (told["fitted"], told["residual"]) == pytest.approx((law, math.log(loss / law)), abs=1e-9)
    assert content["runs"][2]["run"] == "line 4"
    lines = (tmp_path / "out" / "fit.json").read_text().splitlines()
    assert sum('"run":' in line and '"residual":' in line for line in lines) == 35  # a run a line


def test_laws_are_compared_with_a_figure_and_what_each_foretells(points, command, tmp_path):
    given = (f"--points={points}", "--columns=N=params", "--bootstrap=0", f"--out={tmp_path / 'out'}")
    code, out, _ = command(
        "llm_jax.scaling.fit", *given, "--compare=chinchilla-tied,kaplan", "--predict=C=1e23"
    )
    assert not code and "at C=1e+23 by kaplan" in out
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    best, other = content["compared"]
    assert best["law"] == "chinchilla-tied" and best["aicc"] < other["aicc"]
    assert len(best["held_out"]) == 5 and best["held_out"][-1]["rms"] == best["largest"]
    assert best["fit"]["parameters"]["alpha"]["value"] == pytest.approx(0.36, abs=0.03)
    assert [answer["at"] for answer in content["predictions"]] == [
        "C=1e+23 by chinchilla-tied", "C=1e+23 by kaplan"
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fit.json", "compared.png"}


def test_two_recipes_get_a_figure_and_an_answer_each(command, tmp_path):
    C = np.geomspace(1e15, 1e20, 9)
    rows = [(c, 1.7 + 300 * (s * c) ** -0.15, r) for r, s in (("a", 1), ("b", 1.5), ("c", 3)) for c in C]
    pd.DataFrame(rows, columns=["C", "loss", "rule"]).to_csv(tmp_path / "points.csv", index=False)
    given = (f"--points={tmp_path / 'points.csv'}", "--law=power", "--multiplier=rule", "--bootstrap=0")
    code, out, _ = command(
        "llm_jax.scaling.fit", *given, "--where=rule != 'b'", "--predict=C=1e21", f"--out={tmp_path / 'out'}"
    )
    assert not code and "rule=c reaches with C what rule=a reaches with 3 C" in out
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert content["multiplier"]["value"] == pytest.approx(3, rel=1e-3) and len(content["runs"]) == 18
    first, second = content["predictions"]
    assert first["at"] == "C=1e+21, rule=a" and second["at"] == "C=1e+21, rule=c"
    assert first["loss"]["value"] == pytest.approx(1.7 + 300 * 1e21**-0.15, rel=1e-5)
    assert second["loss"]["value"] == pytest.approx(1.7 + 300 * 3e21**-0.15, rel=1e-5)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"fit.json", "multiplier.png", "residuals.png"}
    code, _, err = command("llm_jax.scaling.fit", *given)
    assert code == 2 and "names 3 recipes, two are compared: a, b, c" in err


def test_the_cheapest_run_to_a_loss_is_smaller_the_more_it_serves(points, command):
    given = (f"--points={points}", "--columns=N=params", "--law=chinchilla-tied", "--bootstrap=0")
    sizes = []
    for served in ("0", "1e13"):
        code, out, _ = command(
            "llm_jax.scaling.fit", *given, "--predict=loss=2.1", f"--inference_tokens={served}"
        )
        assert not code and "saved" in out
        sizes.append(float(out.split("\nat loss=2.1")[1].split("\n")[1].split()[1]))
    assert sizes[1] < 0.9 * sizes[0]


def test_a_number_without_an_interval_is_printed_alone():
    assert row("E", Estimate(1.69, *[math.nan] * 3)).split() == ["E", "1.69"]
    assert row("E", Estimate(1.69, 1.5, 1.75, 0.1)).split() == ["E", "1.69", "1.5", "1.75", "0.1"]


def test_approach_2_prints_every_budget(points):
    done = run(
        f"--points={points}", "--columns=N=params", "--approach=2", "--bootstrap=100", "--predict=C=1e23"
    )
    assert done.returncode == 0, done.stderr
    assert "N_opt = k_N C^a" in done.stdout and done.stdout.count("\n") > 10
    assert "sensitivity" in done.stdout and "method akima" in done.stdout


def test_approach_2_writes_its_runs_and_figures(points, command, tmp_path):
    given = (f"--points={points}", "--columns=N=params", "--approach=2", "--bootstrap=100")
    code, _, err = command("llm_jax.scaling.fit", *given, "--weights=1/loss**2", f"--out={tmp_path / 'out'}")
    assert not code, err
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert content["conventions"]["weights"] == "1/loss**2" and content["leave_largest_out"]["C"] > 5e21
    for curve in content["curves"]:
        assert set(curve["refits_beyond"]) == {"below", "above"} and len(curve["fitted"]) == 7
        used = [run for run in curve["fitted"] if run["residual"] is not None]
        assert len(used) == curve["used"] and all(abs(run["residual"]) < 0.02 for run in used)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fit.json", "isoflop.png", "optima.csv", "optima.png", "residuals.png"
    }  # fmt: skip


def test_an_envelope_becomes_a_figure_and_a_table_of_optima_that_is_fitted_in_turn(tmp_path):
    table, out = tmp_path / "curves.csv", tmp_path / "out"
    curves(8).to_csv(table, index=False)
    done = run(f"--points={table}", "--approach=1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "WARNING: no intervals: " in done.stdout
    assert {path.name for path in out.iterdir()} == {"envelope.png", "fit.json", "optima.csv"}
    law = run(f"--points={out / 'optima.csv'}", "--law=n-opt", "--bootstrap=0", f"--out={out / 'law'}")
    assert law.returncode == 0, law.stderr
    found = json.loads((out / "law" / "fit.json").read_text())["parameters"]["a"]["value"]
    assert found == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), abs=0.03)
    assert {path.name for path in (out / "law").iterdir()} == {"curve.png", "fit.json", "residuals.png"}


def test_few_runs_beside_parameters_have_no_intervals_and_an_answer_that_fails_costs_no_fit(
    command, tmp_path
):
    sweep(noise=0.003).iloc[::6].to_csv(tmp_path / "six.csv", index=False)
    given = (f"--points={tmp_path / 'six.csv'}", "--bootstrap=100", f"--out={tmp_path / 'out'}")
    code, out, err = command("llm_jax.scaling.fit", *given, "--predict=loss=0.1")
    assert code == 2 and err.count("\n") == 1 and "no intervals: 6 runs for 5 parameters" in out
    content = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert all(content["parameters"]["E"][name] is None for name in ("low", "high", "standard_error"))


def test_who_reads_a_line_and_leaves_costs_no_file(points, tmp_path):
    command = [sys.executable, "-m", "llm_jax.scaling.fit", f"--points={points}", "--columns=N=params"]
    asked = ["--law=chinchilla-tied", "--bootstrap=0", f"--out={tmp_path / 'out'}"]
    with subprocess.Popen(command + asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141 and (tmp_path / "out" / "fit.json").exists()


def test_ctrl_c_says_one_word_during_a_fit(points, command, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_jax.scaling.reading.read_points", interrupted)
    assert command("llm_jax.scaling.fit", f"--points={points}") == (130, "", "stopped\n")


@pytest.mark.parametrize("module", ["llm_jax.scaling.fit", "launch.local"])
def test_ctrl_c_says_one_word_while_modules_load(module, tmp_path):
    (tmp_path / "absl.py").write_text("raise KeyboardInterrupt")  # every command imports it
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode in (130, -signal.SIGINT) and (done.stdout, done.stderr) == ("", "stopped\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--points is missing"),
        (["--points=POINTS"], "no column 'N'"),
        (["--points=POINTS", "--columns=N=params", "--approach=2", "--law=power"], "belongs to Approach 3"),
        (["--points=POINTS", "--predict=N=many"], "not a positive number"),
        (["--points=POINTS", "--predict=C=1e-300"], "no run has a C of 1e-300"),
        (["--points=POINTS", "--level=nan"], "--level=nan is no number that a fit could use"),
        (["--points=POINTS", "--inference_tokens=1e300"], "--inference_tokens=1e+300 is no number"),
        (["--points=POINTS", "--inference_tokens=1e12"], "needs the loss to reach: --predict=loss=2.1"),
        (["--points=POINTS", "--compare=chinchilla,kaplan", "--law=power"], "--law belongs to another"),
        (["--points=POINTS", "--compare=kaplan,power", "--multiplier=x"], "--multiplier belongs to another"),
        (["--points=POINTS", "--approach=1", "--weights=loss"], "belongs to Approach 2 and 3 and vp"),
        (
            ["--points=POINTS", "--columns=N=params", "--tie=E=alpha"],
            "coefficient can't be tied to an exponent",
        ),
        (["--points=POINTS", "--columns=N=params,Loss=loss"], "the name is loss, not Loss"),
        ([*READ, "--predict=N=1e9"], "is predicted at N, D; got N"),
        ([*READ, "--predict=Q=1"], "is predicted at N, D; got Q"),
        ([*READ, "--predict=C=1e22,Q=1"], "it knows no Q beside"),
        ([*READ, "--predict=loss=2,Q=1"], "it knows no Q beside"),
        ([*READ, "--law=power-n", "--predict=C=1e22"], "has no N and D to choose"),
        ([*READ, "--law=data-constrained", "--predict=C=1e22"], "give U too"),
        ([*READ, "--approach=2", "--predict=N=1e9,D=2e10"], "ask for an optimum, --predict=C=1e21"),
        ([*READ, "--compare=chinchilla,power", "--predict=N=1e9"], "is predicted at N, D; got N"),
        (["--bootstrap=abc"], "--bootstrap=abc is not an integer"),
        (["--bootstrp=3"], "no flag --bootstrp; did you mean '--bootstrap'?"),
        (["--points=absent.csv", "--out=POINTS"], "can't be a folder"),
        (["--points=POINTS", "--out=/proc/absent"], "--out=/proc/absent can't be a folder to write in"),
        (["--points=POINTS", "--seed=-1"], "--seed=-1"),
        (["--points=POINTS", "--bootstrap=1"], "--bootstrap=1: intervals take 100 refits or more"),
        (["--points="], "--points is missing"),
        (["--points=FOLDER/nan.csv"], "line 5: loss is missing"),
        (["--points=FOLDER/negative.csv"], "line 5: loss is -3; it must be positive"),
        (["--points=FOLDER/repeated.csv"], "lines 3 and 5 repeat the point"),
        (["--points=FOLDER/three.csv"], "too few points: 3 for the 5"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(points, command, arguments, said):
    (points.parent / "three.csv").write_text("N,D,loss\n1e6,1e7,4.1\n2e6,1e7,3.9\n1e6,2e7,3.8\n")
    for name, cell in (("nan", ""), ("negative", "-3"), ("repeated", "3.9")):
        rows = (points.parent / "three.csv").read_text() + f"2e6,1e7,{cell}\n"
        (points.parent / f"{name}.csv").write_text(rows)
    places = {"POINTS": str(points), "FOLDER": str(points.parent)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    code, out, err = command("llm_jax.scaling.fit", *arguments)
    assert code == 2 and said in err
    assert err.count("\n") == 1 and out == ""
