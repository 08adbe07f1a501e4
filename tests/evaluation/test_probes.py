"""Probes are the same for the same seed, and their answers are right by another way of counting."""

import datetime
import re

import pytest

from llm_jax.config import UserError
from llm_jax.evaluation import probes, standard
from llm_jax.evaluation.probes import PEOPLE, PROBES, VERBS, Probing
from llm_jax.evaluation.requests import Generated
from llm_jax.evaluation.scores import Outcome, evaluate
from llm_jax.evaluation.tasks import Asker, Format


def pairs(name, **more):
    """(size, question, answer) of all items."""
    items = Probing(name=name, **more).items(None)
    return [(item.record["size"], *pair) for item in items for pair in item.record["pairs"]]


@pytest.mark.parametrize("name", PROBES)
def test_a_seed_makes_the_same_questions_and_another_makes_others(name):
    assert pairs(name) == pairs(name) != pairs(name, seed=1)
    assert {size for size, *_ in pairs(name)} == set(PROBES[name].sizes)
    assert pairs(name, count=2) == pairs(name)[: len(pairs(name, count=2))]


def test_letters_are_counted_right():
    for _, question, answer in pairs("letters"):
        letter, word = re.findall(r'"(\w+)"', question)
        assert len(re.findall(letter, word)) == int(answer) > 0
    assert any(int(answer) > 2 for _, _, answer in pairs("letters"))


def test_dates_are_found_by_going_day_by_day():
    for size, question, answer in pairs("dates"):
        said = re.match(r"Today is (\w+), (\d+ \w+ \d{4})\.", question)
        today = datetime.datetime.strptime(said[2], "%d %B %Y").date()
        assert today.strftime("%A") == said[1]
        day = today + datetime.timedelta(1)
        if size <= 7:
            wanted = re.search(r"first (\w+) after", question)[1]
            while day.strftime("%A") != wanted:
                day += datetime.timedelta(1)
        else:
            for _ in range(int(re.search(r"in (\d+) days", question)[1]) - 1):
                day += datetime.timedelta(1)
        assert str(day) == answer


def test_arithmetic_is_right():
    for size, question, answer in pairs("arithmetic"):
        a, sign, b = re.match(r"What is (\d+) (.) (\d+)\?", question).groups()
        assert len(a) == len(b) == size
        result = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(a), int(b))
        assert int(answer) == result


def test_both_orders_have_the_same_words_and_other_answers():
    for item in Probing(name="word_order").items(None):
        (one, answer), (other, turned) = item.record["pairs"]
        assert (
            sorted(re.findall(r"\w+", one)) == sorted(re.findall(r"\w+", other))
            and one != other
            and answer != turned
        )
        for question, wanted in item.record["pairs"]:
            verb = next(verb for verb, done in VERBS.items() if question.endswith(f"Who is {done}?"))
            assert re.search(rf"{verb} the (\w+)\.", question)[1] == wanted


def test_what_is_copied_and_recalled_stands_in_the_question():
    assert all(question.endswith(f": {answer}") for _, question, answer in pairs("copying"))
    for size, question, answer in pairs("recall"):
        name = re.search(r"code of (\w+)\?", question)[1]
        assert f"The code of {name} is {answer}." in question
        assert question.count(".") == 4 + size


def test_the_commonest_answer_is_told_beside_a_score_and_a_question_asked_twice_is_one_draw():
    task = Probing(name="letters")
    items = task.items(None)
    answers = {size: [a for s, _, a in pairs("letters") if s == size] for size in (3, 6, 9)}
    by_size = {size: max(map(of.count, of)) / len(of) for size, of in answers.items()}
    wrong = [Generated("none", "stop", 1)]
    scores = [task.scores(item, wrong) for item in items]
    assert sum(one["commonest"][0] for one in scores) / 32 == pytest.approx(sum(by_size.values()))
    outcome = Outcome("letters", task, Format(), items, [wrong] * len(items), scores)
    assert len(set(outcome.shared)) == len({question for _, question, _ in pairs("letters")}) < len(items)
    assert "commonest" not in Probing(name=probes.SELF, facts=(("layers", 1),)).items(None)[0].record


def test_a_model_is_asked_about_itself(opened):
    task = Probing(name=probes.SELF).about(opened)
    assert dict(task.facts) == {
        "layers": 1,
        "vocabulary": opened.config.vocabulary,
        "context": 64,
        "width": 32,
        "heads": 4,
    }
    item = task.items(None)[0]
    assert task.scores(item, [Generated("I have 1 layer.", "stop", 4)])["accuracy"] == (1.0, 1.0)


def test_the_answer_stands_behind_the_steps(opened):
    task = Probing(name="word_order", way="steps", count=1)
    item = task.items(None)[0]
    (_, first), (_, second) = item.record["pairs"]
    answers = [Generated(f"The {who} is it. Answer: the {who}", "stop", 5) for who in (first, second)]
    assert task.scores(item, answers) == {"accuracy": (2.0, 2.0), "both_orders": (1.0, 1.0)}
    bag = [Generated(f"Answer: the {first}", "stop", 5)] * 2  # blind to order: right once
    assert task.scores(item, bag) == {"accuracy": (1.0, 2.0), "both_orders": (0.0, 1.0)}
    wrong = next(who for who in PEOPLE if who not in (first, second))
    assert task.scores(item, [Generated(wrong, "stop", 1)] * 2)["accuracy"] == (0.0, 2.0)
    assert "step by step" in task.requests(item, Asker(Format(), opened.tokenizer))[0].prompt
    with pytest.raises(UserError, match="word_order:steps has no worked examples"):
        task.items(None, few_shot=1)


def test_examples_come_before_and_sizes_are_told_apart(evaluator):
    task = Probing(name="arithmetic", count=2)
    outcome = evaluate(evaluator, "arithmetic", task, None, Format(few_shot=2), limit=4)
    assert list(outcome.metrics()) == ["accuracy", *(f"accuracy/{size}" for size in (1, 2, 4, 8))]
    asked = task.requests(task.items(None, 2)[0], Asker(Format(few_shot=2), None))[0]
    assert asked.prompt.count("Question: What is ") == 3 and asked.prompt.endswith("\nAnswer:")


def test_names_choose_probe_and_way():
    assert standard.find("dates:steps", None)[1] == Probing(name="dates", way="steps")
    with pytest.raises(UserError, match="no way 'step' of asking dates; did you mean 'dates:steps'"):
        standard.find("dates:step", None)


@pytest.mark.parametrize("chat", [False, True])
def test_a_probe_with_a_tool_goes_on_after_the_result(opened, chat):
    task = standard.find("arithmetic:tool", None)[1]
    item, ask = task.items(None)[0], Asker(Format(chat), opened.tokenizer)
    question, wanted = item.record["pairs"][0]
    first = task.requests(item, ask)[0]
    assert first.stops[0] == "</T_C>" and '"calculator"' in first.prompt and question in first.prompt
    expression = re.match(r"What is (.*)\?", question)[1]
    call = f'<T_C>{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}'
    calls = [Generated(call, "stop", 9, stopped_at="</T_C>")]
    (second,) = task.further(item, ask, calls)
    assert first.prompt.rstrip() in second.prompt or chat
    assert f"{call}</T_C>" in second.prompt and second.prompt.count(wanted) >= 1
    assert ("<|tool|>" in second.prompt) == chat
    answers = [*calls, Generated(wanted, "stop", 3)]
    assert task.further(item, ask, answers) == []
    assert task.scores(item, answers).items() >= {"accuracy": (1.0, 1.0), "called": (1.0, 1.0)}.items()
    assert task.metrics["called"] == ""  # neither is best
    calling = Generated(f'<T_C>{{"arguments": {{"expression": "{wanted}"}}}}', "stop", 9, 0, "</T_C>")
    assert task.scores(item, [calling])["accuracy"] == (0.0, 1.0)  # a number in a call is no answer
    assert task.further(item, ask, calls * 5) == []  # no more calls than that
    for finish in ("length", "stop"):  # it was never ended, by the model's own end either
        assert task.further(item, ask, [Generated(call, finish, 9)]) == []
    with pytest.raises(UserError, match="no way 'tool' of asking copying"):
        standard.find("copying:tool", None)


def test_a_probe_runs_each_of_four_calls_once(opened, monkeypatch):
    runs, task = [], standard.find("arithmetic:tool", None)[1]
    monkeypatch.setattr("llm_jax.inference.tools.result_of", lambda call, box: runs.append(call) or "42")
    item, ask = task.items(None)[0], Asker(Format(), opened.tokenizer)
    answers = [Generated(f"<T_C>call {number}", "stop", 9, 0, "</T_C>") for number in range(6)]
    rounds = [task.further(item, ask, answers[:number]) for number in range(1, 7)]
    assert runs == [f"call {number}" for number in range(4)] and [*map(len, rounds)] == [1, 1, 1, 1, 0, 0]


def test_items_are_asked_as_long_as_a_task_has_more_to_ask(evaluator, monkeypatch):
    task = standard.find("dates:tool", None)[1]
    rounds = []
    monkeypatch.setattr(
        Probing,
        "further",
        lambda self, item, ask, answers: (
            rounds.append(len(answers)) or self.requests(item, ask) * (len(answers) < 3)
        ),
    )
    outcome = evaluate(evaluator, "dates:tool", task, None, Format(), limit=2)
    assert [len(answers) for answers in outcome.answers] == [3, 3] and rounds == [1, 1, 2, 2, 3, 3]
