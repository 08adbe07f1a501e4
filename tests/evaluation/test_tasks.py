"""Tasks ask what their files say, in every format, and judge as they say."""

import dataclasses
import json
import math

import numpy as np
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.evaluation import standard
from llm_jax.evaluation.kinds import Completion, Documents, Generation, MultipleChoice, OpenEnded
from llm_jax.evaluation.requests import Generate, Generated, LogLikelihood, Rolling, Scored
from llm_jax.evaluation.scores import evaluate, metric
from llm_jax.evaluation.tasks import Asker, Format, Item, Task

RIDDLES = [
    {"question": f"What is {n} and {n}?", "options": [f"{n}", f"{2 * n}", f"{3 * n}"], "right": 1, "kind": k}
    for n, k in zip(range(2, 10), "abababab", strict=True)
]
CHOICE = MultipleChoice("riddles.jsonl", question="Q: {question}\nA:", choices="options", answer="right")
COUNTS = {
    "arc_easy": 2376,
    "commonsense_qa": 1221,
    "copa": 100,
    "openbook_qa": 500,
    "piqa": 1838,
    "winograd": 273,
    "truthful_qa": 817,
    "lambada": 5153,
    "simple_arithmetic": 1000,
    "jeopardy": 2117,
    "gsm8k": 1319,
    "svamp": 300,
    "ifeval": 270,
    "xstest": 450,
    "wikitext2": 1,
    **dict.fromkeys(
        ("boolean_expressions", "navigate", "date_understanding", "object_counting", "word_sorting"), 250
    ),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(riddle) + "\n" for riddle in RIDDLES))
    return tmp_path


@pytest.mark.parametrize("name", standard.TASKS)
def test_published_files_are_asked_whole(name, reference_data, opened):
    name, task, folder = standard.find(name, reference_data / "eval")
    items = task.items(folder)
    assert len(items) == COUNTS[name]
    ask, chat = Asker(Format(), opened.tokenizer), Asker(Format(True), opened.tokenizer)
    for item in items[::50]:
        for request in (*task.requests(item, ask), *task.requests(item, chat)):
            if isinstance(request, LogLikelihood):
                assert request.continuation.strip()
                assert request.written or request.context.endswith("\n") or request.continuation[0] == " "


def test_published_tasks_find_their_own_right_answers_right(reference_data):
    for name in ("gsm8k", "svamp", "object_counting", "word_sorting"):
        _, task, folder = standard.find(name, reference_data / "eval")
        for item in task.items(folder):
            shown = item.record["answer" if "answer" in item.record else "target"]
            scores = task.scores(item, [Generated(shown, "stop", 9)])
            assert scores["accuracy"] == (1.0, 1.0), item
            wrong = task.scores(item, [Generated("no idea", "stop", 9)])
            assert wrong["accuracy"] == (0.0, 1.0)


def test_a_text_and_turns_ask_the_same(folder, opened):
    item = CHOICE.items(folder, few_shot=1)[2]
    text = Asker(Format(few_shot=1), opened.tokenizer)
    shot = item.shots[0]
    before = f"Q: {shot['question']}\nA: {shot['options'][1]}\n\n"
    assert CHOICE.requests(item, text) == [
        LogLikelihood(f"{before}Q: What is 4 and 4?\nA:", f" {answer}") for answer in (4, 8, 12)
    ]
    chat = Asker(Format(True, 1), opened.tokenizer)
    turns = f"<|user|>Q: {shot['question']}\nA:<|end|><|assistant|>{shot['options'][1]}<|end|>"
    turns += "<|user|>Q: What is 4 and 4?\nA:<|end|><|assistant|>"
    assert CHOICE.requests(item, chat) == [LogLikelihood(turns, str(x), True, True) for x in (4, 8, 12)]


def test_no_item_is_its_own_example(folder):
    for item in CHOICE.items(folder, few_shot=7):
        assert len(item.shots) == 7 and item.record not in item.shots
    with pytest.raises(UserError, match=r"riddles.jsonl: 8 records, which give no 8 examples"):
        CHOICE.items(folder, few_shot=8)


def test_a_limit_takes_a_sample_that_larger_ones_contain(folder):
    few, more = (CHOICE.items(folder, limit=limit) for limit in (3, 6))
    assert [item.record for item in few] == [item.record for item in more][:3]
    assert [item.record for item in more] != RIDDLES[:6]


def test_choices_are_weighed_whole_by_token_and_by_byte():
    task = MultipleChoice(choices="options", answer="right")
    record = {"question": "?", "options": ["a", "abcdefgh", "ab"], "right": "B"}
    item = type("Item", (), {"record": record})
    answers = [Scored(2.0, 1, False), Scored(3.0, 2, False), Scored(2.5, 1, False)]
    scores = task.scores(item, answers)
    assert scores["accuracy"] == (0.0, 1.0)  # 2.0 nats are the least
    assert scores["accuracy_by_token"] == (1.0, 1.0)  # 1.5 against 2 and 2.5
    assert scores["accuracy_by_byte"] == (1.0, 1.0)  # 3/8 against 2 and 2.5/2
    weights = np.exp([-2.0, -3.0, -2.5])
    assert scores["probability"][0] == pytest.approx(weights[1] / weights.sum())


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_model_that_diverged_is_never_right(nats):
    item = type("Item", (), {"record": {"question": "?", "choices": ["a", "b"], "answer": 0}})
    assert set(MultipleChoice().scores(item, [Scored(nats, 1, True)] * 2).values()) == {(0.0, 1.0)}
    item = type("Item", (), {"record": {"context": "a", "continuation": "b"}})
    assert Completion().scores(item, [Scored(nats, 1, True)])["accuracy"] == (0.0, 1.0)


def test_a_schema_is_scored_by_what_follows_the_choice(opened):
    task = MultipleChoice(question="", choices="options", answer="right", ending="{rest}")
    record = {"options": ["The cup, for the cup", "The cup, for the bag"], "rest": "was big.", "right": 1}
    item = type("Item", (), {"record": record, "shots": ()})
    assert task.requests(item, Asker(Format(), None)) == [
        LogLikelihood(option, " was big.") for option in record["options"]
    ]
    assert task.requests(item, Asker(Format(True), opened.tokenizer))[1] == LogLikelihood(
        "<|user|>The cup, for the bag<|end|><|assistant|>", "was big.", True, True
    )


def test_other_kinds_ask_for_what_they_are(opened):
    item = type(
        "Item", (), {"record": {"text": "some words", "context": "1 + 1 =", "continuation": "2"}, "shots": ()}
    )
    ask = Asker(Format(), opened.tokenizer)
    assert Completion().requests(item, ask) == [LogLikelihood("1 + 1 =", " 2")]
    assert Completion().scores(item, [Scored(math.log(4), 1, True)]) == {
        "accuracy": (1.0, 1.0),
        "nats_per_answer": (math.log(4), 1.0),
        "bits_per_byte": (2.0, 1.0),
    }
    assert Documents().requests(item, ask) == [Rolling("some words")]
    assert Documents().scores(item, [Scored(math.log(32), 4, False)])["bits_per_byte"] == (5.0, 10.0)
    written = Generation(question="{context}", answer="{continuation}", check_by="numeric", max_tokens=7)
    assert written.requests(item, ask) == [Generate("1 + 1 =", ("\n\n",), 7)]
    assert written.scores(item, [Generated("It is 2.", "length", 5)]) == {
        "accuracy": (1.0, 1.0),
        "stopped": (0.0, 1.0),
    }


RULES = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    "task, record",
    [
        (MultipleChoice(), {"question": "?", "choices": ["a", "b"], "answer": 0}),
        (Completion(), {"context": "a", "continuation": "b"}),
        (Generation(), {"question": "?", "answer": "a"}),
        (Generation(check_by="rules"), RULES),
        (Generation(check_by="refusal"), {"question": "?", "answer": "safe"}),
        (Documents(), {"text": "some"}),
        (OpenEnded(), {}),
    ],
    ids=repr,
)
def test_every_metric_has_a_best_value_or_is_known_to_have_none(task, record):
    text = isinstance(task, Generation | OpenEnded)
    answers = [Generated("a", "stop", 1) if text else Scored(1.0, 1, True)] * 2
    assert task.scores(Item("0", record), answers).keys() == task.metrics.keys()


def test_an_error_is_the_spread_over_items_and_of_ratios_too():
    values = np.random.default_rng(0).random(50)
    value, error, count = metric([(x, 1.0) for x in values])
    assert (value, count) == (pytest.approx(values.mean()), 50)
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert math.isnan(metric([(1.0, 2.0)]).standard_error)
    random = np.random.default_rng(1)
    sizes = random.uniform(1, 9, (4000, 60))
    nats = sizes * random.normal(2, 0.3, sizes.shape)
    ratios = nats.sum(1) / sizes.sum(1)
    errors = [
        metric(list(zip(a, b, strict=True))).standard_error for a, b in zip(nats[:200], sizes, strict=False)
    ]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.1)


def test_a_task_is_evaluated_with_its_groups(folder, evaluator):
    task = MultipleChoice(
        "riddles.jsonl", question="Q: {question}\nA:", choices="options", answer="right", group="kind"
    )
    outcome = evaluate(evaluator, "riddles", task, folder, Format(few_shot=1))
    metrics = outcome.metrics()
    assert list(metrics) == [
        *("accuracy", "accuracy_by_token", "accuracy_by_byte", "probability", "accuracy/a", "accuracy/b")
    ]
    assert metrics["accuracy"].count == 8 and metrics["accuracy/a"].count == 4
    mean = (metrics["accuracy/a"].value + metrics["accuracy/b"].value) / 2
    assert metrics["accuracy"].value == pytest.approx(mean)
    assert json.loads(json.dumps(outcome.to_json()))["items"] == 8 and len(outcome.rows()) == 8
    assert outcome.rows()[0]["item"] == "riddles.jsonl: line 1"


@pytest.mark.parametrize(
    "file, content, task, message",
    [
        (
            "a.jsonl",
            '{"question": "?", "options": ["x", "y"]}',
            CHOICE,
            r"a.jsonl: line 1 has no field 'right'",
        ),
        (
            "a.jsonl",
            '{"question": "?", "options": ["x", "y"], "right": 0}\n{"options": ["x", "y"], "right": 0}',
            CHOICE,
            r"a.jsonl: line 2 has no field 'question'; it has options, right",
        ),
        (
            "a.jsonl",
            '{"question": "?", "options": ["x", "y"], "right": 3}',
            CHOICE,
            "'right' is 3, none of 2 choices",
        ),
        ("a.jsonl", '{"question": "?", "options": ["x"], "right": 0}', CHOICE, "1 choices: give at least 2"),
        (
            "a.jsonl",
            '{"question": "?", "options": ["x", "y", " y"], "right": 1}',
            CHOICE,
            "two choices are the right one: 'y'",
        ),
        (
            "a.jsonl",
            '{"question": null, "options": ["x", "y"], "right": 1}',
            CHOICE,
            "a.jsonl: line 1: the field 'question' is null",
        ),
        ("a.csv", "question,answer\n?\n", Generation(), "a.csv: line 2: the field 'answer' is null"),
        ("a.jsonl", '{"question": "?", "answer": "!"}', Generation(), "line 1: .* nothing to compare with"),
        (
            "a.jsonl",
            '{"context": "a half \\ud83d", "continuation": "b"}',
            Completion(),
            "a.jsonl: line 1 has half a surrogate pair behind .*a half ",
        ),
        ("a.jsonl", '{"question": "?", "options": "x", "right": 0}', CHOICE, "'options' is no list of texts"),
        ("a.jsonl", "[1]", CHOICE, "line 1 is no object with fields"),
        ("a.jsonl", "{", CHOICE, "line 1 is not JSON"),
        ("a.jsonl", "", CHOICE, "a.jsonl has no items"),
        (
            "a.csv",
            "question,right\n?,0\n",
            CHOICE,
            "a.csv: line 2 has no field 'options'; it has question, right",
        ),
        ("a.csv", "", Completion(), "a.csv has no items"),
        ("a.xml", "", CHOICE, "tasks are in files that end in .jsonl, .json, .parquet, .csv, .txt"),
        ("a.json", '{"list": 3}', Completion(within="list"), "neither a list of records nor an object"),
        ("a.jsonl", '{"context": "a", "continuation": " "}', Completion(), "line 1: the answer .* is empty"),
        ("a.jsonl", '{"text": 3}', Documents(), "line 1: the field 'text' is no text"),
        (
            "a.jsonl",
            '{"question": "?", "answer": "many"}',
            Generation(check_by="numeric"),
            "line 1: the answer 'many' has no number",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "instruction_id_list": ["en:no:such"], "kwargs": [{}]}',
            Generation(question="{prompt}", check_by="rules"),
            "line 1: no rule 'no:such'",
        ),
    ],
)
def test_what_cannot_be_asked_is_named_by_file_line_and_field(tmp_path, file, content, task, message):
    (tmp_path / file).write_text(content)
    task = config.replace(task, "file", file)
    with pytest.raises(UserError, match=message):
        task.items(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("ark_easy", None, "no task 'ark_easy'; did you mean 'arc_easy'"),
        ("{}/a.json", "{", "a.json is not JSON"),
        ("{}/a.json", '{"kind": "multiple"}', "a.json: no task 'multiple'; did you mean 'multiple_choice'"),
        ("{}/a.json", '{"file": "b.csv"}', "no kind; it is one of"),
        ("{}/a.json", '{"kind": "completion", "quest": "b"}', "no field 'quest' in Completion"),
        ("{}/a.json", '{"kind": "completion"}', "a.json: no file; it names that of the questions"),
        ("{}/a.json", '{"kind": "generation", "check_by": "feel"}', "check_by"),
        ("{}/a.json", '{"kind": "probe", "name": "lettrs"}', "a.json: no probe 'lettrs'; .* 'letters'"),
        ("{}/a.json", '{"kind": "generation", "max_tokens": 0}', "max_tokens is 0; it is at least 1"),
        ("{}/a.json", '{"kind": "probe", "count": -3}', "a.json: count is -3; it is at least 1"),
        ("{}/a.json", '{"kind": "probe", "name": "copying", "way": "tool"}', "no way 'tool' of asking cop"),
        ("{}/a.json", '{"kind": "probe", "group": "length"}', "by size or pairs, not by 'length'"),
        ("{}/a.json", '{"kind": "generation", "check_by": "regex"}', "pattern is given with check_by=regex"),
        ("{}/a.json", '{"kind": "generation", "check_by": "regex", "pattern": "("}', "no regular expression"),
        ("arc_easy", None, "arc_easy: no file .*; --data=DIR names the folder of task files"),
    ],
)
def test_what_is_no_task_says_so(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        standard.find(name.format(tmp_path), tmp_path)


def test_two_tasks_of_one_name_and_items_that_cannot_be_read_are_told_before_any_is_asked(folder):
    (folder / "a").mkdir()
    for place, file in (("riddles", "riddles"), ("a/riddles", "../riddles"), ("other", "missing")):
        fields = {**config.to_json(CHOICE), "file": f"{file}.jsonl"}
        (folder / f"{place}.json").write_text(json.dumps(fields))
    typed = {name: f"{folder}/{name}.json" for name in ("riddles", "a/riddles", "other")}
    assert standard.tasks([typed["a/riddles"]], folder, few_shot=7)[0][0] == "riddles"
    for names, message in (
        (("riddles", "a/riddles"), "two of the tasks .* are named riddles"),
        (("riddles", "other"), "missing.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            standard.tasks([typed[name] for name in names], folder)


def test_an_item_with_a_choice_longer_than_the_context_is_left_out_and_told(folder, evaluator):
    whole = evaluate(evaluator, "riddles", CHOICE, folder)
    long = {**RIDDLES[0], "options": ["2", "4", "two and two " * 60]}
    (folder / "riddles.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (*RIDDLES, long)))
    outcome = evaluate(evaluator, "riddles", CHOICE, folder)
    assert outcome.metrics() == whole.metrics() and outcome.to_json()["skipped"] == 1
    told = "riddles, raw: 1 items are left out, an answer of which is longer than the context of 64 tokens"
    assert outcome.left_out(64) == [told] and whole.left_out(64) == []


def test_a_task_of_ones_own_is_a_file_beside_its_questions(folder):
    fields = config.to_json(CHOICE)
    (folder / "riddles.json").write_text(json.dumps(fields))
    name, task, place = standard.find(str(folder / "riddles.json"), folder / "elsewhere")
    assert (name, task, place) == ("riddles", CHOICE, folder) and isinstance(task, Task)


def test_long_texts_are_scored_in_windows_that_lie_evenly():
    item = Item("0", {"text": "".join(chr(97 + n % 26) for n in range(100))})
    task, ask = Documents(longest=10, windows=3), Asker(Format(), None)
    starts = [item.record["text"][start : start + 10] for start in (0, 45, 90)]
    assert task.requests(item, ask) == [Rolling(text) for text in starts]
    scores = task.scores(item, [Scored(math.log(2), tokens, False) for tokens in (2, 3, 4)])
    assert scores == {"bits_per_byte": (pytest.approx(3), 30.0), "nats_per_token": (3 * math.log(2), 9.0)}
    assert len(dataclasses.replace(task, longest=40).requests(item, ask)) == 2  # none overlap
    assert Documents(windows=3).requests(item, ask) == [Rolling(item.record["text"])]


def test_a_model_without_a_template_is_asked_in_a_transcript(folder, opened):
    item = CHOICE.items(folder)[0]
    ask = Asker(Format(chat=True), dataclasses.replace(opened.tokenizer, chat_template=None))
    first = CHOICE.requests(item, ask)[0]
    assert first == LogLikelihood("User: Q: What is 2 and 2?\nA:\nAssistant:", " 2")
    assert ask.stops(("x",)) == ("\nUser:",)


@pytest.mark.parametrize(
    "text, finish, scores",
    [
        ("A plain answer.", "stop", (0, 0, 0, 0)),
        ("An answer that goes on", "length", (1, 1, 0, 0)),
        ("I see. No. No. No. No. No. ", "length", (1, 1, 1, 0)),
        ("Yes.\nUser: and then?", "stop", (1, 0, 0, 1)),
        ("Yes.\nuser\nand then?", "stop", (1, 0, 0, 1)),
        ("The user: a person.", "stop", (0, 0, 0, 0)),
    ],
)
def test_degenerate_answers_are_told(text, finish, scores):
    names = ("degenerate", "never_stops", "repeats", "continues_as_user")
    found = OpenEnded().scores(None, [Generated(text, finish, 9)])
    assert found == {name: (float(score), 1.0) for name, score in zip(names, scores, strict=True)}
