"""Tables: what is read, what is filtered, and the one line for each table that can't be fitted."""

import numpy as np
import pandas as pd
import pytest
from known_laws import few_starts, sweep

from llm_jax.config import UserError
from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.isoflop import fit_isoflop
from llm_jax.scaling.tables import check_points, filter_rows

NEEDS = ("N", "D", "loss")


def changed(column: str, value: float) -> pd.DataFrame:
    frame = sweep()
    frame[column] = frame[column].astype(object)
    frame.loc[3, column] = value
    return frame


BAD = {
    "a missing column": (sweep().rename(columns={"D": "tokens"}), "no column 'D'; .*--columns=D=YOURS"),
    "a NaN cell": (changed("loss", np.nan), "row 3: loss is missing"),
    "a text cell": (changed("N", "7B"), "row 3: N is '7B', not a number"),
    "a negative loss": (changed("loss", -1.0), "row 3: loss is -1; it must be positive"),
    "a zero": (changed("D", 0.0), "row 3: D is 0; it must be positive"),
    "an infinite cell": (changed("loss", np.inf), "row 3: loss is inf"),
    "a value of 1e300": (changed("N", 1e300), "row 3: N is 1e.300; nothing above 1e.30"),
    "a repeated point": (
        pd.concat([sweep(), sweep().iloc[:1]], ignore_index=True),
        "rows 0 and 35 repeat the point N=",
    ),
    "a constant D": (sweep().assign(D=1e9), "D is 1e.09 in every run"),
    "three points": (sweep().iloc[:3], "too few points: 3 for the 5"),
    "runs that all diverged": (sweep().assign(status="diverged"), "no runs are left"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_cannot_be_fitted_gets_one_line(case):
    frame, said = BAD[case]
    with pytest.raises(UserError, match=said) as error:
        fit_law(frame, few_starts())
    assert "\n" not in str(error.value)


def test_a_wrong_column_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'loss'"):
        check_points(sweep(), NEEDS, columns={"loss": "los"})


def test_columns_can_have_other_names_and_c_follows_from_n_and_d():
    frame = sweep().rename(columns={"N": "params", "D": "tokens"}).drop(columns="C")
    points = check_points(frame, ("N", "D", "C", "loss"), columns={"N": "params", "D": "tokens"})
    assert np.allclose(points.frame["C"], sweep()["C"]) and points.notes == ("no column C: it is 6 N D",)


def test_a_column_in_another_case_is_understood_and_told_and_two_are_refused():
    frame = sweep().rename(columns={"N": "n", "D": "d", "loss": " Loss"})
    points = check_points(frame, NEEDS)
    assert (
        np.allclose(points.frame["N"], sweep()["N"]) and "the column ' Loss' is read as loss" in points.notes
    )
    with pytest.raises(UserError, match="'Loss' and 'LOSS' could each be loss"):
        check_points(sweep().rename(columns={"loss": "Loss"}).assign(LOSS=1.0), NEEDS)


def test_diverged_runs_are_left_out_and_told():
    frame = sweep().assign(status="done", name=[f"run{i}" for i in range(35)])
    frame.loc[3, ["status", "loss"]] = ["diverged", np.nan]
    points = check_points(frame, NEEDS)
    assert len(points.frame) == 34 and points.excluded == (("run3", "status diverged"),)


def test_repeats_with_seeds_are_no_duplicates():
    frame = pd.concat([sweep().assign(seed=0), sweep(noise=0.01).assign(seed=1)], ignore_index=True)
    assert len(check_points(frame, NEEDS).frame) == 70
    with pytest.raises(UserError, match="repeat"):
        check_points(frame.assign(seed=0), NEEDS)


@pytest.mark.parametrize(
    "expression, kept",
    [
        ("D > 20*N", lambda f: f["D"] > 20 * f["N"]),
        ("1e18 < C <= 1e20 and not N > 1e9", lambda f: (f["C"] > 1e18) & (f["C"] <= 1e20) & (f["N"] <= 1e9)),
        ("name == 'a' or loss < 2.5", lambda f: (f["name"] == "a") | (f["loss"] < 2.5)),
        ("-N / 2 ** 2 > -1e9", lambda f: f["N"] < 4e9),
    ],
)
def test_filters_select_what_they_say(expression, kept):
    frame = sweep().assign(name=["a", "b", "c", "d", "e"] * 7)
    assert (filter_rows(frame, expression) == kept(frame)).all()


@pytest.mark.parametrize(
    "expression, said",
    [
        ("__import__('os').system('true') == 0", "is neither|is no column"),
        ("N.max() > 3", "is neither|is no column"),
        ("[x for x in (1,)] == 1", "is neither|is no column"),
        ("D >", "is no "),
        ("D + N", "is a number, not a condition"),
        ("tokens > 3", "no column 'tokens'"),
        ("D > 'much'", "a number and a text"),
    ],
)
def test_a_filter_is_never_run_as_python(expression, said):
    with pytest.raises(UserError, match=said):
        filter_rows(sweep(), expression)


def test_runs_far_from_the_law_and_off_their_budget_are_named():
    frame = sweep(noise=0.003).assign(name=[f"run{i}" for i in range(35)], budget_flops=lambda f: f["C"])
    assert not fit_law(frame, few_starts(), bootstrap=0).warnings
    frame.loc[9, "loss"] = 11.0
    frame.loc[20, "C"] *= 1.5
    text = " ".join(fit_law(frame, few_starts(), bootstrap=0).warnings)
    assert "from the law, perhaps diverged or of another recipe: run9 (+" in text
    assert "off their budget by more than 10%: run20 (+50%)" in text
    assert "above the sizes beside them by more than 10%, perhaps diverged: run9" in " ".join(
        fit_isoflop(frame, bootstrap=0).warnings
    )


def test_a_filter_that_leaves_nothing_says_so():
    with pytest.raises(UserError, match="no runs are left to fit where N > 1e29"):
        check_points(sweep(), NEEDS, where="N > 1e29")
    with pytest.raises(UserError, match="the status of all 35 is none of done, finished"):
        check_points(sweep().assign(status="crashed"), NEEDS)


def test_n_or_d_of_a_table_with_c_is_asked_for_and_computed_if_told():
    with pytest.raises(UserError, match=r"no column 'D'.* or --columns=D=C/6/N"):
        check_points(sweep().drop(columns="D"), NEEDS)
    frame = sweep().rename(columns={"N": "Model Size", "C": "Training FLOP"}).drop(columns="D")
    points = check_points(frame, NEEDS, columns={"N": "Model Size", "C": "Training FLOP", "D": "C/6/N"})
    assert np.allclose(points.frame["D"], sweep()["D"], rtol=1e-12)


def test_columns_may_be_expressions_of_columns():
    frame = pd.DataFrame({"N": [1.0, 2.0], "tokens in billions": [3.0, 4.0], "gigatokens": [3.0, 4.0]})
    frame = frame.assign(accuracy=[0.4, 0.7], loss=[2.0, 3.0])
    points = check_points(
        frame, ("N", "D", "error"), columns={"D": "gigatokens*1e9", "error": "1 - accuracy"}
    )
    assert list(points.frame["D"]) == [3e9, 4e9] and np.allclose(points.frame["error"], [0.6, 0.3])
    assert list(check_points(frame, NEEDS, columns={"D": "tokens in billions"}).frame["D"]) == [3.0, 4.0]
    for source, said in (("tokens in billion", "did you mean 'tokens in billions'"), ("N +", "is no exp")):
        with pytest.raises(UserError, match=said):
            check_points(frame, NEEDS, columns={"D": source})


def test_columns_with_blanks_or_brackets_stand_in_backticks():
    frame = pd.DataFrame({"params (M)": [1.0, 2.0], "D": [3e9, 4e9], "final loss": [2.0, 3.0]})
    points = check_points(
        frame, NEEDS, columns={"N": "`params (M)`*1e6", "loss": "`final loss`"}, where="`final loss` < 2.5"
    )
    assert points.frame[["N", "loss"]].to_numpy().tolist() == [[1e6, 2.0]]
    for expression in ("final loss < 3", "params (M) > 1"):
        with pytest.raises(UserError, match=r"the column stands in backticks: `(final loss|params \(M\))`"):
            filter_rows(frame, expression)
    with pytest.raises(UserError, match="no column 'final los'; did you mean 'final loss'"):
        filter_rows(frame, "`final los` < 3")


def test_runs_that_a_filter_leaves_out_may_be_anything():
    frame = sweep().assign(ok=1.0)
    frame.loc[3, ["N", "ok"]] = [np.nan, 0.0]
    frame.loc[4, ["D", "ok"]] = [-1.0, 0.0]
    assert len(check_points(frame, ("N", "D", "C", "loss"), where="ok == 1").frame) == 33
    assert len(check_points(frame.drop(columns="C"), ("N", "D", "C", "loss"), where="ok == 1").frame) == 33


@pytest.mark.parametrize("expression", ["N > 9**9**9", "D < 10.0**400", "(" * 300 + "N" + ")" * 300 + " > 1"])
def test_an_expression_that_comes_to_no_number_is_refused_at_once(expression):
    with pytest.raises(UserError, match=r"comes to no number|is no expression"):
        check_points(sweep(), NEEDS, where=expression)


def test_columns_may_swap_names_and_expressions_see_the_new_ones():
    frame = sweep().rename(columns={"N": "D", "D": "N"})
    checked = check_points(frame.drop(columns="C"), NEEDS, columns={"N": "D", "D": "N", "C": "6*N*D"})
    assert (checked.frame[["N", "D"]].to_numpy() == sweep()[["N", "D"]].to_numpy()).all()
    assert np.allclose(checked.frame["C"], sweep()["C"])
