"""Behaviours: the examples are right, what is measured was never taught, and the base's samples decide."""

import dataclasses
import json
import random
import re
import types

import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import conversations
from llm_jax.evaluation import checks, rules
from llm_jax.evaluation.requests import Generated
from llm_jax.experiment_file import load_experiment
from llm_jax.inference import tools
from llm_jax.posttraining import behaviours, world
from llm_jax.posttraining.behaviours import MAKERS, Sampled
from llm_jax.posttraining.world import NEVER, SELDOM, World

WORLD = World(people=64)


def known(right=lambda fact: float(fact.mentions == world.OFTEN)):
    """What a base that knows exactly what it was often told would have answered."""
    draw = random.Random(0)
    return [
        Sampled(fact, world.asked(fact, draw, held).question, held, right(fact))
        for held in (False, True)
        for fact in WORLD.facts_of(held)
    ]


ALL = MAKERS | {"unknown": behaviours.unknown(known())}


def examples(name, held, wanted, count=200):
    draw = random.Random(f"{name} {held} {wanted}")
    return [ALL[name](WORLD, draw, held, wanted) for _ in range(count)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_taught_ends_as_its_judge_wants_it(name, wanted):
    from llm_jax.evaluation.behaviour import Behaviour
    from llm_jax.evaluation.tasks import Item

    judge = Behaviour(shows=name, wanted=wanted)
    for held in (False, True):
        for one in examples(name, held, wanted, 100):
            conversations.check(one.conversation)
            judge.check(one.record)
            said = [
                Generated(text, "stop", 1, stopped_at=close)
                for turn in one.conversation
                if turn["role"] == "assistant"
                for text, close, _ in [turn["content"].partition(tools.CLOSE)]
            ]
            scores = judge.scores(Item("0", one.record), said)
            assert scores["right"] == (1.0, 1.0) and scores["did"] == (float(wanted), 1.0), one
            assert scores.get("answered", (1.0, 1.0)) == (1.0, 1.0)


def test_answers_about_people_are_those_of_the_world():
    truth = {(fact.person, fact.value) for fact in WORLD.facts}
    people = {person for person, _ in truth}
    for one in examples("formats", True, False):
        person = next(
            word for word in one.record["question"].replace("?", " ").split() if word.strip(".") in people
        )
        assert (person.strip("."), one.record["value"]) in truth


def test_calls_are_what_the_tools_take_and_their_results_what_they_give():
    for held in (False, True):
        for one in examples("calls", held, True):
            call = one.record["call"]
            if call["name"] == "calculator":
                box = tools.toolbox(["calculator"])
            else:
                (of,) = call["arguments"]
                box = {call["name"]: behaviours.record_tool(call["name"], of)}
            assert tools.result_of(json.dumps(call), box) == one.record["result"]
            assert f'"name": "{call["name"]}"' in one.record["system"]


def test_what_needs_no_call_names_what_tools_know_or_don_t():
    for held in (False, True):
        groups = {"plain": [], "only named": [], "no such tool": []}
        for one in examples("calls", held, False):
            named = [word for word in world.RECORDS if word in re.findall(r"[\w-]+", one.record["question"])]
            there = [f'"name": "{word}"' in one.record["system"] for word in named]
            groups[one.record["group"]].append(there)
            refused = one.record["value"] == behaviours.NO_TOOL
            assert refused == (one.record["group"] == "no such tool")
        assert min(map(len, groups.values())) > 40
        assert all(there == [True] for there in groups["only named"])
        assert all(there == [False] for there in groups["no such tool"])


def test_a_base_that_knows_nobody_is_taught_no_facts_of_people():
    empty, people = dataclasses.replace(WORLD, known=()), {fact.person for fact in WORLD.facts}
    for name in ("formats", "refusals"):
        talks = behaviours.taught(MAKERS[name], empty, 150)
        said = {word.strip(".?") for talk in talks for turn in talk for word in turn["content"].split()}
        assert not said & people
    assert len(behaviours.held_out(MAKERS["formats"], empty, 60, wanted=True)) == 60


@pytest.mark.parametrize(("name", "topics"), [("refusals", 10), ("formats", 10)])
def test_questions_that_share_thing_or_words_share_a_topic(name, topics):
    found = behaviours.held_out(MAKERS[name], WORLD, 60, wanted=True)
    assert len({one["topic"] for one in found}) == topics
    assert all(one["topic"] in one["question"] for one in found)


def test_a_behaviour_that_look_alikes_get_too_is_not_learned():
    experiment, _ = load_experiment("experiments/behaviours.py")

    def interval(what, low, high):
        return {what: {"together": [low, high]}}

    found = {}
    for name, gain, cost in (("calls", 0.1, 0.14), ("formats", -0.1, 0.0), ("refusals", 0.5, 0.4)):
        found[f"{name}/wanted"] = interval("right", gain, 0.9)
        found[f"{name}/unwanted"] = interval("did", -0.1, cost)
    assert experiment.learned(found | {"unknown/wanted": interval("right", 0.5, 0.9)}, 0.15) == ["calls"]
    assert experiment.questions(experiment.get_config("cpu")) == 8


@pytest.mark.parametrize("name", ALL)
def test_no_question_person_thing_or_tool_is_both_taught_and_measured(name):
    taught = {one.record["question"] for wanted in (True, False) for one in examples(name, False, wanted)}
    measured = {one.record["question"] for wanted in (True, False) for one in examples(name, True, wanted)}
    people = {fact.person for fact in WORLD.facts}

    def topics(questions):
        words = {word.strip(".,?") for question in questions for word in question.split()}
        return words & (people | set(world.RECORDS) | harmful())

    assert not taught & measured
    assert not topics(taught) & topics(measured)


def harmful():
    return {name for names in world.HARMFUL.values() for name in names}


def test_no_wording_is_both_taught_and_measured():
    lists = [attribute.wordings for attribute in world.ATTRIBUTES.values()]
    lists += [world.REQUESTS, world.QUESTIONS, world.SUMS, world.COPIES, behaviours.LOOKED_UP]
    lists += [behaviours.NAMED]
    lists += [part for form in behaviours.FORMS.values() for part in (form.asked, form.mentioned)]
    for wordings in lists:
        taught, measured = world.part(wordings, False), world.part(wordings, True)
        assert taught and measured and not set(taught) & set(measured)
        assert len(set(wordings)) == len(wordings)


def test_pretraining_text_shows_no_behaviour():
    texts = WORLD.documents()
    text = "\n".join(next(texts) for _ in range(300))
    assert tools.OPEN not in text and behaviours.UNKNOWN not in text
    answers = [line.removeprefix("Assistant: ") for line in text.splitlines() if line.startswith("Assistant")]
    assert len(answers) == 2400 and not any(checks.refuses(answer) for answer in answers)
    forms = [form.rule for form in behaviours.FORMS.values()]
    assert not any(
        rules.follows(answer, *rule)
        for answer in answers
        if not answer.lstrip("-").isdecimal()
        for rule in forms
    )


def test_unknown_is_said_where_the_base_s_samples_are_wrong_and_nowhere_else():
    for held in (False, True):
        for wanted in (True, False):
            facts = {one.question: one for one in known()}
            for one in examples("unknown", held, wanted):
                assert facts[one.record["question"]].fact.mentions in ((SELDOM, NEVER) if wanted else (1.0,))
                assert (one.conversation[-1]["content"] == behaviours.UNKNOWN) == wanted
    with pytest.raises(UserError, match="8 of each are needed"):
        behaviours.unknown(known(lambda fact: 0.0))


def test_samples_are_counted_against_the_truth_question_by_question():
    """A stand-in for a model that knows of pets alone, and of those in every second sample."""
    values = {fact.person: fact.value for fact in WORLD.facts if fact.attribute == "pet"}

    def run(requests, what):
        asked = [next((p for p in values if p in request.prompt), None) for request in requests]
        assert len({request.sampling.seed for request in requests}) == len(requests)  # no two alike
        return [
            Generated(f" {values[person]}" if person and number % 2 else "rock", "stop", 1)
            for number, person in enumerate(asked)
        ]

    model = types.SimpleNamespace(run=run, opened=types.SimpleNamespace(tokenizer=None))
    found = behaviours.sampled(model, WORLD, 4)
    assert {one.fact for one in found} == set(WORLD.facts)
    assert {one.right for one in found if one.fact.attribute == "pet"} == {0.5}
    assert {one.right for one in found if one.fact.attribute != "pet"} == {0.0}


def test_a_mix_has_a_third_of_each_kind_and_measures_have_different_questions():
    talks = behaviours.taught(ALL["refusals"], WORLD, 300)
    assert sum(talk[-1]["content"] == behaviours.REFUSAL for talk in talks) == 100
    found = behaviours.held_out(ALL["refusals"], WORLD, 60, wanted=True)
    assert len({one["question"] for one in found}) == len(found) == 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": ()}, "as \\(layers, width\\)"),
        ({"sizes": ((1, 0),)}, "as \\(layers, width\\)"),
        ({"mixes": ("manners",)}, "mixes has manners"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"vocabulary": 10}, "at least 300"),
        ({"world": World(people=3)}, "world.people is 3"),
    ],
)
def test_what_the_experiment_can_t_do_is_refused_in_a_line(change, words):
    experiment, _ = load_experiment("experiments/behaviours.py")
    with pytest.raises(UserError, match=words):
        config.check(dataclasses.replace(experiment.get_config("smoke"), **change))
