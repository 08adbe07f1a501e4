"""Greedy tokens are those of transformers; who decodes beside a row changes nothing of it."""

import dataclasses
import functools
import json
import math

import greedy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import parameters

from llm_jax.config import UserError
from llm_jax.inference import generation
from llm_jax.inference.batching import Batcher, Request, complete
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import open_model
from llm_jax.inference.sampling import Sampling
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.models import Layout
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import MeshConfig, make_mesh, shardings

SCAN = Layout(unroll=False, attention="reference")  # the least to compile
STRAIGHT = "gpt2", "llama", "gemma3", "qwen3-moe"  # as a CPU runs them
TINY = Transformer(layers=2, width=16, heads=4, kv_heads=2, vocabulary=257, windows=(20, None))


@pytest.mark.parametrize("name", greedy.NAMES)
def test_greedy_tokens_are_those_of_transformers_with_and_without_a_cache(name):
    expected = json.loads((greedy.HERE / "fixtures" / "greedy.json").read_text())["tokens"][name]
    opened = open_model(greedy.MODELS / name)
    layout = dataclasses.replace(SCAN, unroll=name in STRAIGHT)
    engine = Engine(opened.config, opened.params, layout=layout)
    requests = [Request(prompt, max_tokens=greedy.LONGEST) for prompt in greedy.prompts(name)]
    answers = complete(Batcher(engine, 2), requests)
    assert [answer.ids for answer in answers] == expected
    model = engine.model
    whole = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}).hidden).argmax(-1))
    longest = max(len(a.ids) + len(a.request.prompt) for a in answers)
    rows = np.zeros((2, longest), np.int32)
    for row, answer in enumerate(answers):
        text = [*answer.request.prompt, *answer.ids]
        rows[row, : len(text)] = text
    for answer, following in zip(answers, np.asarray(whole(engine.params, rows)), strict=True):
        first = len(answer.request.prompt) - 1
        assert following[first : first + len(answer.ids)].tolist() == answer.ids


@functools.cache
def engine():
    return Engine(TINY, parameters(TINY.build(SCAN)), candidates=3, layout=SCAN)


def requests():
    random = np.random.default_rng(0)
    samplings = [Sampling(), Sampling(1.0, seed=3), Sampling(0.9, top_k=9, top_p=0.8, repetition_penalty=1.2)]
    return [
        Request(
            random.integers(0, 257, random.integers(1, 32)).astype(np.int32),
            samplings[number % 3],
            max_tokens=int(random.integers(1, 50)),
            number=number,
        )
        for number in range(9)
    ]


@functools.cache
def alone():
    batcher = Batcher(engine(), 1)
    return [complete(batcher, [request])[0].ids for request in requests()]


def test_requests_that_come_and_go_at_random_are_answered_as_one_at_a_time():
    random, batcher = np.random.default_rng(1), Batcher(engine(), 4)
    coming, answers = list(enumerate(requests())), {}
    while coming or batcher.busy:
        for _ in range(random.integers(0, 3)):
            if coming:
                number, request = coming.pop(random.integers(len(coming)))
                answers[number] = batcher.submit(request)
        for _ in range(random.integers(1, 12)):
            batcher.step()
    assert [answers[number].ids for number in range(9)] == alone()


def test_a_prompt_read_in_pieces_is_continued_as_one_read_at_once(monkeypatch):
    monkeypatch.setattr(generation, "PIECE", 8)
    answers = complete(Batcher(engine(), 4), requests()[:4])
    assert max(len(answer.request.prompt) for answer in answers) > 16
    assert [answer.ids for answer in answers] == alone()[:4]


def test_a_cancelled_request_gives_its_slot_to_the_next():
    batcher, (first, second, *_) = Batcher(engine(), 1), requests()[3:]
    gone, stays = batcher.submit(first), batcher.submit(second)
    batcher.step()
    batcher.cancel(gone)
    while batcher.busy:
        batcher.step()
    assert len(gone.ids) == 1 and stays.ids == alone()[4]


def test_there_are_as_many_rows_as_were_needed_at_once():
    batcher = Batcher(engine(), 4)
    for together, rows in ((slice(0, 1), 1), (slice(1, 4), 4), (slice(0, 1), 1)):
        answers = [batcher.submit(request) for request in requests()[together]]
        batcher.step()
        assert len(batcher._rows.token) == rows
        while batcher.busy:
            batcher.step()
        assert [answer.ids for answer in answers] == alone()[together]


def test_a_row_of_short_answers_keeps_no_long_one_waiting():
    batcher, prompt = Batcher(engine(), 2), requests()[0].prompt
    long = batcher.submit(Request(prompt, max_tokens=20))
    for _ in range(40):
        batcher.submit(Request(prompt, max_tokens=1))
        batcher.step()
    assert long.finish == "length"


def test_samples_differ_by_number_and_seed_and_repeat_with_them():
    prompt = np.array([1, 2, 3], np.int32)
    rows = [(0, 0), (0, 1), (1, 0), (0, 0)]
    answers = complete(
        Batcher(engine(), 4),
        [Request(prompt, Sampling(1.0, seed=seed), 8, number=number) for seed, number in rows],
    )
    first, other, seeded, again = (answer.ids for answer in answers)
    assert first == again and first != other and first != seeded


def test_a_prompt_of_several_samples_is_read_once(monkeypatch):
    compiled, rows = engine()._read, []
    monkeypatch.setattr(engine(), "_read", lambda *args: rows.append(len(args[3])) or compiled(*args))
    asked = [
        dataclasses.replace(request, number=number, max_tokens=8)
        for request in requests()[1:3]
        for number in range(3)
    ]
    together = complete(Batcher(engine(), 6), asked)
    assert rows == [2] and len({tuple(answer.ids) for answer in together}) == 6
    one_by_one = [complete(Batcher(engine(), 1), [request])[0].ids for request in asked]
    assert [answer.ids for answer in together] == one_by_one


def test_log_probabilities_are_those_of_the_whole_pass():
    model, answer = engine().model, complete(Batcher(engine(), 4), requests()[:1])[0]
    text = jnp.asarray([[*answer.request.prompt, *answer.ids]])
    whole = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}).hidden))
    logprobs = np.asarray(jax.nn.log_softmax(whole(engine().params, text)))[
        0, len(answer.request.prompt) - 1 :
    ]
    for token, row in zip(answer.tokens, logprobs, strict=False):
        np.testing.assert_allclose(token.logprob, row[token.id], atol=1e-4)
        assert [number for number, _ in token.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in token.top], np.sort(row)[:-4:-1], atol=1e-4)


def test_a_mesh_of_devices_gives_the_tokens_of_one():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    model, params = engine().model, engine().params
    axes = jax.tree.map(lambda role: role.axes, model.roles(params))
    spread = Engine(TINY, jax.device_put(params, shardings(params, axes, mesh)), mesh=mesh, layout=SCAN)
    chosen = requests()[:2]
    assert [answer.ids for answer in complete(Batcher(spread, 2), chosen)] == alone()[:2]
    state = spread.empty(2, 64)[0]
    assert "tensor" in str(state["body"]["0"]["key"].sharding.spec)


def test_float32_is_multiplied_in_float32_wherever_it_runs():
    with engine().computing():
        lowered = jax.jit(engine().model.unembed).lower(engine().params, jnp.zeros((1, 16)))
    assert "HIGHEST" in lowered.as_text()
    half = dataclasses.replace(TINY, dtype="bfloat16")
    with generation.computing(half, None):
        assert jax.config.jax_default_matmul_precision is None
    state, rows = engine().empty(1, 64)
    step = engine()._step.lower  # as the engine itself calls it
    with engine().computing():
        assert "DEFAULT" not in step(engine().params, state, rows, np.ones(1, bool)).as_text()


def test_layers_apart_are_held_once_where_the_stacks_are_used_up():
    config = Transformer(layers=6, width=32, heads=2, vocabulary=5)
    straight, params = Layout(unroll=True), parameters(config.build())
    stacks = jax.tree.leaves(params["body"])
    kept = Engine(config, params, layout=straight)
    assert not any(stack.is_deleted() for stack in stacks)
    used = Engine(config, params, layout=straight, keep=False)
    assert all(stack.is_deleted() for stack in stacks)
    jax.tree.map(np.testing.assert_array_equal, used.params, kept.params)
    assert bytes_of(used.params) == bytes_of(jax.eval_shape(config.build().init, jax.random.key(0)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.array([], np.int32)), "the prompt is empty"),
        (Request(np.array([257], np.int32)), r"outside 0 \.\. 256"),
        (Request(np.zeros(20, np.int32)), "20 tokens, and the model's context is 20"),
        (Request(np.zeros(2, np.int32), max_tokens=0), "max_tokens is 0"),
        (Request(np.zeros(2, np.int32), Sampling(top_p=2)), "top_p is 2"),
        (Request(np.zeros(2, np.int32), stops=("",)), "a stop text is empty"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(request_, message):
    with pytest.raises(UserError, match=message):
        Batcher(engine(), 4, context=20).submit(request_)


def test_an_answer_ends_at_a_stop_token_a_stop_text_its_length_or_the_context():
    prompt, letters = requests()[0].prompt, tokenizers.of_bytes()
    free = complete(Batcher(engine(), 4), [Request(prompt, max_tokens=8)])[0]
    stopped, full = complete(
        Batcher(engine(), 4, context=len(prompt) + 5, tokenizer=letters),
        [Request(prompt, stop_ids=(free.ids[3],)), Request(prompt)],
    )
    assert (free.finish, stopped.finish, full.finish) == ("length", "stop", "length")
    assert stopped.ids == free.ids[: free.ids.index(free.ids[3])]
    assert full.ids == free.ids[:5]


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
