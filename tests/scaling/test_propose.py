"""The command that proposes a sweep: a plan within its budget, with its price; mistakes are one line."""

import json

import pandas as pd
import pytest

HOFFMANN = "--values=E=1.69,A=406.4,B=410.7,alpha=0.34,beta=0.28"
ASKED = ("--budget=1e19", "--target=N=7e9,D=1.4e11", "--sizes=1e7:1e9:12")


def test_a_plan_within_its_budget_is_proposed_priced_and_written(command, tmp_path):
    code, out, err = command("llm_jax.scaling.propose", *ASKED, HOFFMANN, f"--out={tmp_path / 'plan.csv'}")
    assert (code, err) == (None, "")
    plan = pd.read_csv(tmp_path / "plan.csv")
    assert len(plan) > 10 and 9e18 < plan["flops"].sum() <= 1e19
    assert f"\n{len(plan)} runs, " in out and "H100 hours" in out
    assert "forecast at N=7G, D=140G: 90% within" in out


def test_a_fit_says_the_same_as_its_values(command, tmp_path):
    content = {
        "law": {"name": "chinchilla"},
        "noise": 0.005,
        "parameters": {n: {"value": float(v)} for n, v in (p.split("=") for p in HOFFMANN[9:].split(","))},
    }
    (tmp_path / "fit.json").write_text(json.dumps(content))
    by_values = command("llm_jax.scaling.propose", *ASKED, HOFFMANN)
    assert command("llm_jax.scaling.propose", *ASKED, f"--fit={tmp_path}") == by_values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*ASKED], "one of --fit=FOLDER and --values"),
        ([*ASKED, "--fit=nowhere"], "--fit=nowhere: no fit.json of a law there"),
        ([*ASKED[1:], HOFFMANN], "--budget is missing"),
        ([ASKED[0], HOFFMANN], "--target says what is forecast"),
        ([*ASKED, "--values=E=1.69"], "--values lacks A, alpha, B, beta"),
        ([*ASKED, HOFFMANN, "--sizes=big"], "--sizes=big: write LOW:HIGH:COUNT"),
        ([*ASKED, HOFFMANN, "--sizes=1e7:1e9:1000000000"], "10,000 sizes are the most"),
        ([*ASKED, HOFFMANN + ",gamma=1"], "has no parameter 'gamma'"),
        ([*ASKED, "--fit=nowhere", "--law=kaplan"], "--law belongs to --values"),
        ([*ASKED, HOFFMANN, "--noise=-1"], "--noise=-1: the standard deviation of ln loss"),
        ([*ASKED, HOFFMANN, "--noise=nan"], "--noise=nan: the standard deviation of ln loss"),
        ([*ASKED, HOFFMANN, "--out=."], "--out=. is a folder"),
        ([*ASKED, HOFFMANN, "--device=H10"], "did you mean 'H100'"),
        (["--budget=1e12", *ASKED[1:], HOFFMANN], "cells keep within the limits"),
    ],
)
def test_mistakes_are_one_line(command, arguments, words):
    code, out, err = command("llm_jax.scaling.propose", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and words in err
