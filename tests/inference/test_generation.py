"""Greedy tokens are those of transformers; who decodes beside a row changes nothing of it."""

import dataclasses
import functools
import json

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
from llm_jax.inference.quantising import quantise
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.text import TextStream
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.models import Layout
from llm_jax.models.int8 import Int8
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


def test_text_is_given_when_it_is_certain_and_ends_before_a_stop():
    letters = tokenizers.of_bytes()
    text = "naïve → STOP it"
    stream = TextStream(letters, ["STOP", "never"])
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] and "S" not in pieces[-1]
        if stream.stopped:
            break
    assert "".join(pieces) + stream.rest() == "naïve → "
    stream = TextStream(letters, ["STOP"])
    assert "".join(map(stream.push, b"a STO")) == "a " and stream.rest() == "STO"
    assert TextStream(letters).push(0xC3) == ""


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


def test_int8_weights_compute_what_their_values_say_in_a_quarter_of_the_memory():
    wide = dataclasses.replace(TINY, width=64, tied=False, windows=(None,))
    params = parameters(wide.build(SCAN))
    small = jax.jit(quantise)(params)
    assert bytes_of(small) < 0.3 * bytes_of(params)

    def widened(leaf, shape):
        if not isinstance(leaf, Int8):
            return leaf
        matrix = leaf.values * leaf.scales[..., None]
        return (matrix if matrix.shape == shape.shape else jnp.swapaxes(matrix, -1, -2)).reshape(shape.shape)

    same = jax.tree.map(widened, small, params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    model, tokens = wide.build(SCAN), jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    whole = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}).hidden))
    # One row is summed in float32, a few are multiplied in 16 bits.
    np.testing.assert_allclose(whole(small, tokens), whole(same, tokens), atol=3e-3)
    one = tokens[:, :1]
    np.testing.assert_allclose(whole(small, one), whole(same, one), atol=1e-4)
    for found, weight in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, weight, atol=0.51 / 127 * np.abs(weight).max())
    request = Request(np.asarray(tokens[0]), max_tokens=6)
    answers = [complete(Batcher(Engine(wide, p, layout=SCAN), 1), [request])[0].ids for p in (small, same)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rows", [1, 2, 16, 128, 129])
def test_int8_products_of_any_number_of_rows_are_those_of_the_widened_matrix(rows):
    random = np.random.default_rng(rows)
    small = Int8(
        random.integers(-127, 128, (40, 96)).astype(np.int8), random.uniform(0.01, 0.1, 40), outputs=(40,)
    )
    x = random.normal(size=(rows, 96)).astype(np.float32)
    x[0] *= 1e-6
    x[-1, 3] = 100.0  # one entry far larger than the others
    expected = x.astype(np.float64) @ (small.values * small.scales[:, None]).T
    found = jax.jit(lambda x: jax.tree.map(jnp.asarray, small).product(x))(x)
    scale = np.abs(x).max(-1, keepdims=True) * np.sqrt((small.values * small.scales[:, None]) ** 2).sum(-1)
    assert np.all(np.abs(found - expected) <= 4 * scale / 127 / 508)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
