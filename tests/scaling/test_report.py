"""The report: one self-contained page whose numbers are the fits', and the same as aligned text."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import synthetic_sweep as sweep

from llm_jax import files
from llm_jax.scaling import forecast, report
from llm_jax.scaling.fits import fit
from llm_jax.scaling.isoflop import fit_isoflop
from llm_jax.scaling.rates import RateCheck

COUNTING = "parameters without embeddings"


@pytest.fixture(scope="module")
def story():
    """A sweep of which one run diverged, its hold-out measured, its rate too low for the smallest model."""
    runs = sweep.runs()
    runs.loc[3, ["status", "loss"]] = "diverged", np.nan
    grid, held = runs[runs["role"] == "grid"], runs[runs["role"] == "holdout"].iloc[0]
    law = fit(grid, sweep.FewStarts(), bootstrap=100, counting=COUNTING)
    made = forecast.make(law, held["N"], held["D"], held["C"])
    return report.Report(
        title="A sweep of <b>synthetic</b> runs",
        runs=runs,
        law=law,
        isoflop=fit_isoflop(grid, bootstrap=50, counting=COUNTING),
        outcomes=[forecast.Outcome(made, forecast.check(made, held["loss"]))],
        rates=[
            RateCheck(3e4, 5e7, {0.5: (2.66, 2.67), 1.0: (2.65, 2.66), 2.0: (2.60, 2.61)}, 0.007),
            RateCheck(1e6, 1e7, {0.5: (2.19, 2.20), 1.0: (2.18, 2.19), 2.0: (2.21, 2.22)}, 0.007),
        ],
        question="Does it hold?",
        conventions={"vocabulary": "2,048"},
        notes=["budget 9e+13: N=5,000 left out"],
    )


@pytest.fixture(scope="module")
def folder(story, tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    assert report.write(place, story) == place / "report.html"
    return place


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def test_the_page_needs_nothing_but_itself_and_the_pngs_beside_it(page, folder):
    places = [v for _, a in page.tags for k, v in a.items() if k in ("src", "srcset", "href")]
    assert len(places) == 12
    for place in places:
        if not place.startswith("data:image/svg+xml;base64,"):
            assert (folder / place).read_bytes().startswith(b"\x89PNG")
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"url\(|@import|https?://", (folder / "report.html").read_text())


def test_the_page_is_made_for_phones_and_both_colour_schemes(page):
    metas = {a.get("name"): a.get("content") for tag, a in page.tags if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    dark = [a for tag, a in page.tags if tag == "source" and a["media"] == "(prefers-color-scheme: dark)"]
    light = [a for tag, a in page.tags if tag == "img"]
    assert len(dark) == len(light) == 4
    assert all(d["srcset"] != image["src"] and image["alt"] for d, image in zip(dark, light, strict=True))


def test_the_page_is_no_wider_than_a_phone(folder, browser):
    browser.show(360, 780)
    browser.open(f"file://{folder}/report.html")
    assert 300 < browser.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_numbers_on_the_page_are_those_of_the_fits(page, story):
    for fitted in story.fits:
        for number in fitted.parameters.values():
            assert all(f"{part:.5g}" in page.text for part in number)
    made, check = story.outcomes[0]
    assert (
        f"measured {check.measured:.4f}, forecast {made.loss:.4f} ({check.relative_error:+.2%}, "
        f"{check.in_noise:+.1f} of the noise of one run)" in page.text
    )
    assert f"90% [{made.intervals[0.9][0]:.4f}, {made.intervals[0.9][1]:.4f}]" in page.text
    assert made.written_utc[11:19] + " UTC" in page.text
    for words in ("Does it hold?", COUNTING, "2,048", "N=5,000 left out"):
        assert words in page.text


def test_a_diverged_run_is_listed_with_its_reason(page, story):
    name = story.runs["name"][3]
    assert page.text.count(name) == 2
    assert f"{name} status diverged" in page.text


def test_a_doubtful_rate_is_said_and_marks_the_exponents(page, story, tmp_path):
    assert "rate not optimal at N=30,000" in page.text and "a†" in page.text
    confirmed = dataclasses.replace(story, rates=story.rates[1:])
    assert confirmed.all_warnings == []
    assert "†" not in report.write(tmp_path, confirmed).read_text()


def test_a_sweep_too_small_for_its_law_says_so_before_anything_else(story, tmp_path):
    assert story.too_small == "" and "too small" not in report.summary(story)
    grid = story.runs[(story.runs["role"] == "grid") & (story.runs["budget_flops"] < 5e13)]
    small = report.Report("Small", grid, fit(grid, sweep.FewStarts(), bootstrap=0), warnings=["w"])
    page = Page(report.write(tmp_path, small).read_text())
    assert page.text.index("too small to judge the law by: 11 runs at 2 budgets") < page.text.index(
        "Warnings ("
    )
    assert [a for tag, a in page.tags if tag == "details"] == [{"class": "box warn"}]  # closed
    assert report.summary(small).splitlines()[2].startswith("This sweep is too small")


def test_what_users_write_is_escaped(page, folder):
    assert "A sweep of &lt;b&gt;synthetic&lt;/b&gt; runs" in (folder / "report.html").read_text()
    assert "A sweep of <b>synthetic</b> runs" in page.text


def test_a_missed_forecast_is_called_outside(story):
    made = story.outcomes[0].forecast
    missed = forecast.Outcome(made, forecast.check(made, made.intervals[0.95][1] * 1.01))
    assert "OUTSIDE every interval" in report.verdict(missed)[0]
    assert "not measured yet" in report.verdict(forecast.Outcome(made))[0]
    between = forecast.check(made, (made.intervals[0.9][1] + made.intervals[0.95][1]) / 2)
    assert "inside the 95% interval" in report.verdict(forecast.Outcome(made, between))[0]


def test_a_law_that_fails_at_the_hold_out_is_named_where_another_made_the_forecast(story):
    made, _ = story.outcomes[0]
    assert not story.misses, "the law that made it was right"
    low, high = made.intervals[0.95]
    for measured, sign in ((low * 0.97, "-"), (high * 1.03, "+")):
        text = forecast.miss(story.law, made, measured)
        assert f"misses the hold-out by {sign}" in text and f"{measured:.4f} lies outside" in text
    missed = forecast.Outcome(made, forecast.check(made, low * 0.97))
    told = dataclasses.replace(story, outcomes=[missed])
    assert told.misses[0] in told.all_warnings and told.misses[0] in report.summary(told)


def test_the_summary_says_the_same_in_aligned_columns(story):
    text = report.summary(story)
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("run "))
    table = lines[start : start + len(story.runs) + 1]
    place = table[0].index("status")
    assert {line[place:].split()[0] for line in table[1:]} == {"done", "diverged"}
    ends = [re.search(r"\S+$", line).end() for line in table]
    assert len(set(ends)) == 1, "the last column aligns right"
    assert max(map(len, table)) <= 120
    for words in (
        "rate not optimal at",
        "inside the 90% interval",
        "N_opt = k_N C^a",
        "L = E + A/N^alpha",
        "diverged",
    ):
        assert words in text


def test_a_configs_field_is_a_column_by_its_last_name_unless_the_runs_have_it(story):
    table = report.runs_table(story)
    assert "rate" in table.header
    both = dataclasses.replace(story, runs=story.runs.assign(learning_rate=0.125))
    place = table.header.index("rate")
    assert {row[place] for row in report.runs_table(both).rows} == {"1.25e-01"}


def test_a_sweep_without_forecast_or_checks_whose_curves_were_all_refused_has_a_report_too(tmp_path):
    runs = sweep.runs()[["name", "role", "status", "N", "D", "C", "budget_flops", "loss"]]
    runs = runs[(runs["role"] == "grid") & (runs["N"] > 3e5)]
    law = fit(runs, sweep.FewStarts(), bootstrap=0)
    bare = report.Report("Bare", runs, law, warnings=["no budget had a minimum"])
    page = Page(report.write(tmp_path, bare).read_text())
    assert "no budget had a minimum" in page.text
    names = ["frontier.png", "isoflop.png", "optima.png", "residuals.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(curve.refused for curve in report.isoflop_curves(bare)[0])
    assert "WARNING: no budget had a minimum" in report.summary(bare)


def test_the_facts_are_json_and_hold_fits_forecasts_and_warnings(story):
    facts = json.loads(files.dumps(report.facts(story)))
    assert facts["law"]["parameters"]["E"]["value"] == pytest.approx(story.law.parameters["E"].value)
    assert facts["forecasts"][0]["check"]["covered"] == {"0.9": True, "0.95": True}
    assert any("rate not optimal" in warning for warning in facts["warnings"])


def test_training_curves_end_at_the_runs_compute(tmp_path):
    runs = sweep.runs()
    sweep.write_records(tmp_path, runs)
    curves = report.training_curves(tmp_path, runs.assign(run=runs["name"]))
    assert len(curves) == len(runs)
    for curve, run in zip(curves, runs.itertuples(), strict=True):
        assert curve["C"].iloc[-1] == pytest.approx(run.C)
        assert curve["C"].is_monotonic_increasing and curve["loss"].iloc[-1] == pytest.approx(
            run.loss, rel=0.02
        )
