"""In turns, what is trained on, what is sent and what is scored are the same tokens, piece by piece."""

import dataclasses

import numpy as np
import pytest

from llm_jax.data.templates import BUILT_IN
from llm_jax.data.writer import Writer
from llm_jax.evaluation.requests import pair
from llm_jax.evaluation.tasks import Asker, Format
from llm_jax.inference.conversation import Speaker
from llm_jax.interop.tokenizer import with_turns

TALK = [
    {"role": "user", "content": "the rain again?"},
    {"role": "assistant", "content": "the grain in spain"},
    {"role": "user", "content": "again?"},
    {"role": "assistant", "content": "in the plain"},
]


@pytest.fixture(scope="module", params=BUILT_IN)
def taught(request, opened):
    """(what encodes training text, the model as it is opened afterwards) for each template."""
    tokenizer, template = dataclasses.replace(opened.tokenizer, chat_template=None), BUILT_IN[request.param]
    after = opened._replace(tokenizer=with_turns(tokenizer, template))
    return Writer(tokenizer.codec(), template), after


def joined(parts):
    return np.concatenate([part.tokens for part in parts])


def test_what_is_sent_for_every_turn_is_what_was_trained_on_before_it(taught):
    writer, opened = taught
    speaker, parts = Speaker(opened), writer.encode(TALK)
    answers = [number for number, part in enumerate(parts) if part.said.any()]
    assert len(answers) == 2
    for number, turns in zip(answers, (1, 3), strict=True):
        np.testing.assert_array_equal(speaker.ids(TALK[:turns]), joined(parts[:number]))


def test_an_answer_is_scored_in_the_tokens_that_were_trained_on(taught):
    writer, opened = taught
    before, said, *_ = writer.encode(TALK[:2])
    question, answer = (turn["content"] for turn in TALK[:2])
    context, following = pair(opened, Asker(Format(chat=True), opened.tokenizer).scored(question, answer))
    np.testing.assert_array_equal(context, before.tokens)
    np.testing.assert_array_equal(following, said.tokens[:-1])  # the last one ends the turn
