"""A model taught by conversations answers through its own template, and stops where it was taught to."""

import json

import numpy as np
import pytest

from llm_jax.data import Chat
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.opening import open_model
from llm_jax.inference.sampling import Sampling
from llm_jax.interop import huggingface
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Execution, Run
from llm_jax.sharding import MeshConfig
from llm_jax.train import train

ANSWERS = {"Red?": "stop", "Green?": "go", "Blue?": "sky"}


@pytest.fixture(scope="module", params=["chatml", "plain"])
def taught(request, tmp_path_factory):
    """A small model that has seen three questions with their answers, hundreds of times."""
    place = tmp_path_factory.mktemp(request.param)
    random = np.random.default_rng(0)
    with (place / "talks.jsonl").open("w") as file:
        for _ in range(600):
            turns = []
            for question in random.choice(list(ANSWERS), 3):
                turns.append({"role": "user", "content": str(question)})
                turns.append({"role": "assistant", "content": ANSWERS[question]})
            file.write(json.dumps({"messages": turns}) + "\n")
    data = Chat((str(place / "talks.jsonl"),), template=request.param, sequence_length=128, repeat=True)
    run = Run(
        Transformer(layers=2, width=32, heads=4),
        data,
        AdamW(learning_rate=2e-2),
        tokens=60 * data.tokens_per_step,
        execution=Execution(mesh=MeshConfig(data=1)),
    )
    result = train(run, place / "run")
    return place / "run", result


def test_it_learns_the_answers_and_nothing_of_the_questions(taught):
    _, result = taught
    assert result["loss"] < 0.05  # nats per answered token; which question comes is anybody's guess
    assert result["bits_per_byte"] < 0.2


def test_it_answers_what_it_was_taught_and_stops(taught, tmp_path):
    opened = open_model(taught[0])
    speaker = Speaker(opened)
    messages = [{"role": "user", "content": "Green?"}]
    for question, answer in [("Green?", "go"), ("Blue?", "sky"), ("Red?", "stop")]:
        messages[-1] = {"role": "user", "content": question}
        reply = speaker.reply(messages, Sampling(temperature=0.0), max_tokens=20)
        assert "".join(reply).strip() == answer and reply.answer.finish == "stop"
        messages += [{"role": "assistant", "content": answer}, {}]
    # And so it does wherever it goes.
    huggingface.save(tmp_path / "saved", opened.config, opened.params, opened.tokenizer)
    again = Speaker(open_model(tmp_path / "saved"))
    assert "".join(again.reply(messages[:1], Sampling(temperature=0.0), max_tokens=20)).strip() == "go"
