"""IFEval's rules decide as its published code does, on texts that are made to be near the border."""

import importlib
import random

import pytest

from llm_jax.data import readers
from llm_jax.evaluation.rules import RULES, follows

pytest.importorskip("lm_eval", reason="the extra `harness` isn't installed")
for needed in ("langdetect", "immutabledict", "nltk"):
    pytest.importorskip(needed, reason=f"IFEval's own code needs {needed}")

# Those that lean on nltk's models or on langdetect are this house's own.
OWN = (
    "language:response_language",
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
)
PIECES = [
    "The quick brown fox, and the dog. ",
    "* a point\n",
    "- another point\n",
    "*highlighted* ",
    "**bold** ",
    "** **",
    "[name] ",
    "<<A title>>\n",
    "<<>>",
    "\n\n",
    "\n***\n",
    " *** ",
    "******",
    "\n******\n",
    "P.S. one more thing",
    "\nP.P.S no more",
    "p. s. lower",
    "SECTION 1\n",
    "Section 2\n",
    "My answer is yes.",
    "My answer is perhaps.",
    '"',
    '{"a": 1}',
    "```json\n",
    "```",
    "WORDS IN CAPITALS ",
    "no comma here ",
]


@pytest.fixture(scope="module")
def theirs():
    """The published registry of instructions, without the download of what only OWN rules need."""
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "find", lambda name: name)
        return importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT


def texts(draw, record, settings):
    """Texts of pieces, and of what the prompt asks for, so that rules are followed and broken."""
    asked = [str(x) for value in settings.values() for x in (value if isinstance(value, list) else [value])]
    for _ in range(12):
        parts = draw.choices([*PIECES, *asked, *(f"{word} " for word in asked)], k=draw.randint(1, 14))
        yield "".join(parts)
    for end in asked:
        yield f"{record['prompt']} {' '.join(draw.choices(PIECES, k=3))} {end}"
        yield end.upper() + "\n\n" + end
        yield "".join(f"{end} {number}\n" for number in range(draw.randint(1, 9)))
    yield '"' + "".join(draw.choices(PIECES, k=4)) + '"'
    yield '```json\n{"b": [1, 2]}\n```'
    yield "one\n******\ntwo"
    yield "\n".join(["* point"] * draw.randint(1, 6))
    yield "\n\n***\n\n".join(["part"] * draw.randint(1, 6))
    yield "e" * draw.randint(1, 60) + " word" * draw.randint(1, 400)


def test_every_rule_decides_as_the_published_code(theirs, reference_data):
    draw, seen = random.Random(0), {}
    for _, record in readers.records(reference_data / "eval" / "ifeval_en_first270.jsonl.xz", "prompts"):
        for name, kwargs in zip(record["instruction_id_list"], record["kwargs"], strict=True):
            name = name.removeprefix("en:")
            settings = {key: value for key, value in kwargs.items() if value}
            if name in OWN or not settings.get("letter", "a").isalpha():
                continue  # for a sign that is no letter the published code draws some letter at random
            rule = theirs[name](name)
            rule.build_description(**settings)
            for text in texts(draw, record, settings):
                expected = bool(text.strip()) and bool(rule.check_following(text))
                assert follows(text, name, settings) == expected, (name, settings, text)
                seen.setdefault(name, set()).add(expected)
    assert {*seen, *OWN} == {*RULES}
    assert not [name for name, results in seen.items() if len(results) < 2]  # each was followed and broken
