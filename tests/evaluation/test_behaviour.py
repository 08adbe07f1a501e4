"""Measures of behaviours tell good answers from bad ones."""

import json

import pytest

from llm_jax.evaluation.behaviour import Behaviour
from llm_jax.evaluation.requests import Generated
from llm_jax.evaluation.tasks import Asker, Format, Item

CALL = {"name": "calculator", "arguments": {"expression": "12 * 34"}}
SUM = {
    "question": "What is 12 * 34?",
    "system": "Tools: calculator",
    "call": CALL,
    "result": "408",
    "value": "408",
}
CAPITALS = {
    "question": "Where does Ada live? In capitals.",
    "value": "Arlow",
    "instruction_id_list": ["change_case:english_capital"],
    "kwargs": [{}],
}
PLAIN = {"question": "Where does Ada live?", "value": "Arlow"}


def called(**changes):
    return f"<T_C>{json.dumps(CALL | changes)}"


@pytest.mark.parametrize(
    ("shows", "wanted", "record", "said", "did", "right"),
    [
        ("formats", True, CAPITALS, "ARLOW", 1, 1),
        ("formats", True, CAPITALS, "BENFOLD", 1, 0),
        ("formats", True, CAPITALS, "Arlow", 0, 0),
        ("formats", False, CAPITALS, "Arlow", 0, 1),
        ("formats", False, CAPITALS, "ARLOW", 1, 0),
        ("calls", True, SUM, called(), 1, 1),
        ("calls", True, SUM, called(arguments={"expression": "12*34"}), 1, 1),
        ("calls", True, SUM, called(arguments={"expression": "12 * 35"}), 1, 0),
        ("calls", True, SUM, called(name="calendar"), 1, 0),
        ("calls", True, SUM, "<T_C>{12 * 34", 1, 0),
        ("calls", True, SUM, "408", 0, 0),
        ("calls", False, PLAIN | {"system": "Tools: calculator"}, called(), 1, 0),
        ("calls", False, PLAIN | {"system": "Tools: calculator"}, "Arlow", 0, 1),
        ("unknown", True, PLAIN, "I don't know.", 1, 1),
        ("unknown", True, PLAIN, "Arlow", 0, 0),
        ("unknown", False, PLAIN, "I don't know.", 1, 0),
        ("unknown", False, PLAIN, "Arlow", 0, 1),
        ("unknown", False, PLAIN, "Benfold", 0, 0),
        ("refusals", True, PLAIN, "I'm sorry, but I can't help with that.", 1, 1),
        ("refusals", True, PLAIN, "First learn about it.", 0, 0),
        ("refusals", False, PLAIN, "I'm sorry, but I can't help with that.", 1, 0),
        ("refusals", False, PLAIN, "Arlow.", 0, 1),
    ],
)
def test_doing_it_and_being_right_are_told_apart(shows, wanted, record, said, did, right):
    task = Behaviour(shows=shows, wanted=wanted)
    task.check(record)
    stop = "</T_C>" if "<T_C>" in said else ""
    scores = task.scores(Item("0", record), [Generated(said, "stop", 1, stopped_at=stop)])
    assert (scores["did"][0], scores["right"][0]) == (did, right)
    assert scores.keys() <= task.metrics.keys()
    assert task.metrics["did"] == ("highest" if wanted else "lowest")


def test_a_right_call_is_told_its_result_and_a_wrong_one_ends_the_item():
    task, ask = Behaviour(shows="calls"), Asker(Format(chat=True), None)
    item = Item("0", SUM)
    (first,) = task.requests(item, ask)
    assert first.prompt == "Tools: calculator\nUser: What is 12 * 34?\nAssistant:"
    assert "</T_C>" in first.stops and "\nUser:" in first.stops
    answer = Generated(f" {called()}", "stop", 9, stopped_at="</T_C>")
    (second,) = task.further(item, ask, [answer])
    assert second.prompt == f"{first.prompt} {called()}</T_C>\nTool: 408\nAssistant:"
    assert task.further(item, ask, [answer, Generated(" 408", "stop", 2)]) == []
    assert task.further(item, ask, [Generated("408", "stop", 2)]) == []
    cut = Generated(f" {called()}", "length", 9)  # it ran out of tokens, and called nothing
    assert task.further(item, ask, [cut]) == [] and task.scores(item, [cut])["right"] == (0.0, 1.0)
    assert task.scores(item, [answer, Generated(" 408", "stop", 2)])["answered"] == (1.0, 1.0)
    assert task.scores(item, [answer, Generated(" 409", "stop", 2)])["answered"] == (0.0, 1.0)
