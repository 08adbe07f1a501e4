"""Two models on the same items: what lies between them, and how sure that is."""

import dataclasses

import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.evaluation.compare import difference, newcombe, of_all, paired
from llm_jax.evaluation.kinds import Documents, MultipleChoice, OpenEnded
from llm_jax.evaluation.probes import Probing
from llm_jax.evaluation.requests import Generated
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import Format, Item
from llm_jax.experiment_file import load_experiment
from llm_jax.posttraining import versus


@pytest.fixture(scope="module")
def experiment():
    """experiments/base_vs_instruct.py."""
    return load_experiment("experiments/base_vs_instruct.py")[0]


def test_an_interval_holds_the_true_difference_as_often_as_it_says():
    """Items that both find hard or easy."""
    random, held = np.random.default_rng(0), 0
    for trial in range(200):
        ease = random.uniform(0, 0.8, 80)
        base, instruct = random.random(80) < ease, random.random(80) < ease + 0.1
        pairs = [((float(a), 1.0), (float(b), 1.0)) for a, b in zip(base, instruct, strict=True)]
        found = difference(pairs, draws=400, seed=trial)
        assert found.difference == pytest.approx(instruct.mean() - base.mean())
        held += found.low <= 0.1 <= found.high

    assert 180 <= held <= 199


def test_a_ratio_s_difference_weighs_items_by_their_size():
    pairs = [((1.0, 1.0), (2.0, 1.0)), ((9.0, 9.0), (9.0, 9.0))]
    found = difference(pairs)
    assert (found.first, found.second, found.count) == (1.0, pytest.approx(1.1), 2)
    assert found.low <= 0.0 and found.high >= 1.0  # what is drawn may be either twice
    many = difference(pairs * 200)
    assert many.difference == pytest.approx(0.1) and 0.05 < many.low < 0.1 < many.high < 0.15


def test_items_that_share_what_varies_are_drawn_together():
    """Sixty questions of which ten each stand or fall together say as much as six."""
    random, alone, grouped = np.random.default_rng(0), 0, 0
    groups = [f"topic {number // 10}" for number in range(60)]
    for trial in range(100):
        changes = np.repeat(random.normal(0.2, 1.0, 6), 10) + random.normal(0, 0.3, 60)
        pairs = [((0.0, 1.0), (change, 1.0)) for change in changes]
        found = difference(pairs, 200, trial), difference(pairs, 200, trial, groups)
        alone, grouped = (
            held + (one.low <= 0.2 <= one.high) for held, one in zip((alone, grouped), found, strict=True)
        )
    assert (found[1].count, found[1].units) == (60, 6) and found[0].units == 60
    assert found[1].difference == pytest.approx(found[0].difference)
    assert grouped >= 90 and alone < 70


def test_all_of_many_intervals_hold_as_often_as_one_alone():
    random, alone, together = np.random.default_rng(0), 0, 0
    for trial in range(60):
        drawn = random.random((20, 60, 2)) < 0.3  # twenty tasks on which two models are alike
        pairs = [[((float(a), 1.0), (float(b), 1.0)) for a, b in task] for task in drawn]
        alone, together = (
            held
            + all(one.low <= 0 <= one.high for one in (difference(p, 200, trial, level=level) for p in pairs))
            for held, level in ((alone, 0.95), (together, of_all(20)))
        )
    assert together >= 56 and alone < 40


def in_pairs(both, first, second, neither):
    """Two arrays of zeros and ones from the counts of their table."""
    counts = [both, first, second, neither]
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014)
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman and others (Statistics with Confidence, 2000), table 6.2
    ],
)
def test_the_interval_of_rare_events_is_the_published_one(table, low, high):
    first, second = in_pairs(*table)
    assert newcombe(second, first) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert newcombe(first, second) == (pytest.approx(-high, abs=5e-4), pytest.approx(-low, abs=5e-4))


def test_a_difference_of_shares_is_at_most_one():
    found = difference([((0.0, 1.0), (1.0, 1.0))] * 3 + [((0.0, 1.0), (0.0, 1.0))])
    assert found.difference == 0.75 and found.high == 1.0 and found.low > -1


@pytest.mark.parametrize("always", [0.0, 1.0, 2.0])
def test_what_never_happened_is_not_told_for_sure(always):
    of = max(always, 1.0)  # so many questions in an item
    found = difference([((always, of), (always, of))] * 60)
    assert found.difference == 0 and found.low == -found.high
    assert found.high == pytest.approx(1.96**2 / (60 + 1.96**2), rel=1e-3)  # Wilson's for 0 of 60


def test_a_few_failures_lie_in_an_interval_as_often_as_it_says():
    """At 2% against 4% of 60 items; percentiles alone hold it less often than nine times in ten."""
    random, held = np.random.default_rng(0), 0
    for trial in range(300):
        drawn = random.random((60, 2)) < (0.02, 0.04)
        found = difference([((float(a), 1.0), (float(b), 1.0)) for a, b in drawn], draws=200, seed=trial)
        held += found.low <= 0.02 <= found.high
    assert held >= 280


def test_equal_answers_differ_by_nothing_and_other_items_are_refused(evaluator):
    task = Probing(name="arithmetic", count=2)
    one = evaluate(evaluator, "arithmetic", task, None, Format())
    assert all(pair.difference == 0 and pair.low == -pair.high for pair in paired(one, one).values())
    with pytest.raises(UserError, match="arithmetic: the two models were asked about other items"):
        paired(one, dataclasses.replace(one, items=one.items[1:], scores=one.scores[1:]))


def test_a_lower_loss_is_a_gain():
    """Of what is lost and of what is right, both lower in the second."""
    items = [Item(str(number), {}) for number in range(20)]

    def outcome(task, metric, value):
        scores = [{metric: (value, 1.0)} for _ in items]
        return Outcome("", task, Format(), items, [[]] * 20, scores)

    found = {
        who: {
            f"{name}/{form}": outcome(task, metric, value)
            for name, task, metric in (
                ("text", Documents(), "bits_per_byte"),
                ("asked", MultipleChoice(), "accuracy"),
            )
            for form in ("raw", "chat")
        }
        for who, value in (("base", 1.0), ("instruct", 0.0))
    }
    tasks = versus.compared(found, comparable=True)["tasks"]
    assert {key: versus.gain(one)[0] > 0 for key, one in tasks.items()} == {
        f"{name}/{form}": name == "text" for name in ("text", "asked") for form in ("raw", "chat", "own")
    }
    assert tasks["text/raw"]["base"] == 1.0 and tasks["text/raw"]["instruct"] == 0.0


def test_what_was_cut_or_left_out_stands_in_the_report(experiment):
    def outcome(cut, judged):
        items = [Item(str(n), {"prompt": "a"}) for n in range(2)]
        said = [[Generated("b", "stop", 1, cut)], [Generated("b", "stop", 1)]]
        scores = [{"degenerate": (0.0, 1.0)}, {"degenerate": (1.0, 1.0)} if judged else {}]
        return Outcome("open_ended", OpenEnded(), Format(), items, said, scores)

    found = {who: {} for who in ("base", "instruct")}
    for form in ("raw", "chat"):
        found["base"] |= {f"open_ended/{form}": outcome(3, True), f"task/{form}": outcome(0, True)}
        found["instruct"] |= {f"open_ended/{form}": outcome(0, True), f"task/{form}": outcome(0, False)}
    result = versus.compared(found, True)
    assert result["left_out"]["base"]["open_ended/raw"] == {"cut": 1, "skipped": 0}
    assert result["left_out"]["instruct"]["task/chat"] == {"cut": 0, "skipped": 1}
    notes = experiment.told(experiment.get_config("cpu"), 64, found)
    assert versus.report("?", ("a", "b"), found, result, notes).notes == notes
    assert "base: open_ended, raw: 1 prompts were cut to the context of 64 tokens" in notes
    assert "instruct: open_ended, raw: 1 items can't be judged here and are left out" in notes


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_an_experiment_with_one_checkpoint_says_what_it_needs(experiment, tmp_path, scale):
    with pytest.raises(UserError, match=r"--config.base=PATH --config.instruct=PATH"):
        experiment.measure(dataclasses.replace(experiment.get_config(scale), base="a"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_any_two_checkpoints_are_compared_at_the_smoke_scale(experiment, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    asked = experiment.get_config("smoke")
    asked = dataclasses.replace(asked, base=str(saved), instruct=str(saved), prompts=("Hi",), max_tokens=4)
    result = experiment.measure(asked, tmp_path)
    assert result["models"]["base"] == result["models"]["instruct"]
    assert result["models"]["base"]["path"] == str(saved) and result["models"]["base"]["content"]
    alike = result["text"]["bits_per_byte"], *(result["tasks"][f"sums/{form}"] for form in ("raw", "chat"))
    assert [one["difference"] for one in alike] == [0, 0, 0]
