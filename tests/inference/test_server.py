"""The API answers as one asked alone would, refuses what it can't do, and outlives both."""

import concurrent.futures
import contextlib
import json
import math
import socket
import time

import numpy as np
import pytest
from serving import CALL, CALLING, HI, LONG, TINY, Web

from llm_jax.config import UserError
from llm_jax.data import SentencePiece
from llm_jax.inference import guards, worker
from llm_jax.inference.batching import Request, complete
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.tools import MOST_CALLS
from llm_jax.interop import huggingface
from llm_jax.interop import tokenizer as tokenizers

PROMPT = TINY.tokenizer.encode("[u]hi[a]", special=False)


@pytest.fixture(scope="module")
def alone():
    """Answers to one request after another."""
    batcher = Speaker(TINY, candidates=20).batcher

    def answers(*requests):
        return [complete(batcher, [request])[0] for request in requests]

    return answers


# ---- what is answered ----


def test_greedy_text_is_that_of_generate(web, command, tmp_path):
    huggingface.save(tmp_path / "tiny", *TINY[1:4])
    flags = [f"--model={tmp_path / 'tiny'}", "--prompt=Once upon", "--max_tokens=12", "--json"]
    code, out, _ = command("llm_jax.generate", *flags)
    generated = json.loads(out)
    found = web.client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=12, temperature=0, echo=True
    )
    assert not code and found.choices[0].text == "Once upon" + generated["text"]
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 12)
    ids = TINY.encode("Once upon").tolist()
    both = web.client.completions.create(
        model="tiny", prompt=[ids, ids[:4]], max_tokens=12, temperature=0, logprobs=2
    )
    first, second = both.choices
    assert first.text == generated["text"] and both.usage.prompt_tokens == len(ids) + 4
    np.testing.assert_allclose(
        first.logprobs.token_logprobs, [token["logprob"] for token in generated["tokens"]], atol=1e-5
    )
    assert all(len(top) == 2 for top in second.logprobs.top_logprobs)
    assert first.logprobs.text_offset[:2] == [0, len(first.logprobs.tokens[0])]


def test_a_chat_is_answered_with_its_candidates_whole_and_streamed_alike(web, alone):
    expected = alone(Request(PROMPT, max_tokens=9))[0]
    asked = {"max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = web.chat(**asked)
    chunks = list(web.chat(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert whole.choices[0].message.content == expected.text
    assert "".join(piece.delta.content for piece in pieces) == expected.text
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]
    assert chunks[-1].usage == whole.usage and whole.usage.total_tokens == len(PROMPT) + 9
    tokens = whole.choices[0].logprobs.content
    assert tokens == [token for piece in pieces for token in piece.logprobs.content]
    for token, (number, logprob, top) in zip(tokens, expected.tokens, strict=True):
        assert token.id == number and math.isclose(token.logprob, logprob, abs_tol=1e-5)
        assert [one.id for one in token.top_logprobs] == [number for number, _ in top[:3]]
    said = bytes(byte for token in tokens for byte in token.bytes)
    assert said.decode(errors="replace") == expected.text


def test_samples_differ_repeat_with_their_seed_and_without_one_are_new(web, alone):
    asked = {"max_tokens": 8, "temperature": 1.3, "n": 3, "top_p": 0.9, "extra_body": {"top_k": 40}}
    texts = [[choice.message.content for choice in web.chat(**asked, seed=5).choices] for _ in range(2)]
    sampling = Sampling(1.3, top_k=40, top_p=0.9, seed=5)
    requests = [Request(PROMPT, sampling, 8, number=number) for number in range(3)]
    assert texts[0] == texts[1] == [answer.text for answer in alone(*requests)]
    assert len(set(texts[0])) == 3
    free = [web.chat(max_tokens=8, temperature=1.3).choices[0].message.content for _ in range(2)]
    assert free[0] != free[1]


def test_an_answer_stops_at_a_text_and_is_bent_by_a_bias(web):
    found = web.chat(max_tokens=30, temperature=0, logit_bias={"120": 100}, stop="xxxx").choices[0]
    assert (found.message.content, found.finish_reason) == ("", "stop")
    found = web.chat(max_completion_tokens=3, temperature=0, logit_bias={"120": 100}).choices[0]
    assert (found.message.content, found.finish_reason) == ("xxx", "length")


def test_many_clients_at_once_are_answered_as_one_after_another(web):
    def ask(number):
        message = [{"role": "user", "content": "hello " * (number % 4) + str(number)}]
        asked = {"messages": message, "seed": number, "temperature": 0.8, "max_tokens": 5 + 3 * number}
        return web.chat(**asked).choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(10)))
    assert together == [ask(number) for number in range(10)]


EXTREME = [
    {"top_k": 2**40},
    {"top_p": 1e-60},
    {"temperature": 1e300},
    {"repetition_penalty": 1e-300},
    {"logit_bias": {str(token): -1e300 for token in range(257)}},
]


@pytest.mark.parametrize("extreme", EXTREME, ids=lambda extreme: next(iter(extreme)))
def test_an_extreme_request_disturbs_nobody_beside_it(web, alone, extreme):
    expected = alone(Request(PROMPT, max_tokens=300))[0].text
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        innocent = pool.submit(web.chat, max_tokens=300, temperature=0)
        until(lambda: web.batcher().busy)
        code, found, _ = web.ask("/v1/chat/completions", {**CHAT, "max_tokens": 3, **extreme})
        assert code == 200, found
        assert innocent.result().choices[0].message.content == expected


def test_both_models_are_offered_by_name_and_what_one_is_sent_is_told(web):
    assert [model.id for model in web.client.models.list()] == ["tiny", "base"]
    assert web.client.models.retrieve("base").context is None
    body = {"messages": [{"role": "system", "content": "Be."}, *HI]}
    _, found, _ = web.ask("/v1/chat/context", {"model": "tiny", **body})
    assert found["text"] == "[s]Be.[u]hi[a]" and len(found["tokens"]) == 14
    _, found, _ = web.ask("/v1/chat/context", {"model": "base", **body})
    assert found["text"] == "Be.\nUser: hi\nAssistant:"
    assert "".join(token["token"] for token in found["tokens"]) == found["text"]


def test_tokens_are_spelled_by_the_bytes_they_stand_for():
    text = "naïve → 思 a b\n" * 9
    pieces = tokenizers.of_sentencepiece(SentencePiece("bpe", vocabulary=275).train(iter([text])))
    for tokenizer in (tokenizers.of_bytes(), pieces):
        ids = tokenizer.encode(text + "日", special=False).tolist()
        assert b"".join(map(tokenizer.spelling, ids)) == (text + "日").encode()
        assert tokenizer.decode(ids) == text + "日"
    assert tokenizers.of_bytes().spelling(256) == b"<|endoftext|>"
    assert tokenizers.of_bytes().spelling(300) == b""


# ---- tools ----

CALCULATOR = {"model": "caller", "messages": HI, "tools": [{"type": "calculator"}], **CALLING}
CALLED = [{"role": "assistant", "content": CALL}, {"role": "tool", "content": "42"}]


def test_a_call_is_answered_on_the_server_whole_and_streamed_alike(calling):
    _, whole, _ = calling.ask("/v1/chat/completions", CALCULATOR)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Z", "tool_turns": CALLED}
    assert choice["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 2
    told = {name: CALCULATOR[name] for name in ("model", "tools")}
    sent = [
        len(calling.ask("/v1/chat/context", told | {"messages": HI + turns})[1]["tokens"])
        for turns in ([], CALLED)
    ]
    assert whole["usage"]["prompt_tokens"] == sum(sent)
    _, stream, _ = calling.ask("/v1/chat/completions", CALCULATOR | {"stream": True})
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    turns = []
    for (one,) in (chunk["choices"] for chunk in chunks):
        if role := one["delta"].get("role"):
            turns.append({"role": role, "content": ""})
        turns[-1]["content"] += one["delta"]["content"]
    assert turns == [*CALLED, {"role": "assistant", "content": "Z"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


def test_a_model_that_calls_forever_is_ended_and_one_that_may_not_is_not_answered(calling):
    def turns(**changes):
        _, found, _ = calling.ask("/v1/chat/completions", CALCULATOR | {"repetition_penalty": 1} | changes)
        message = found["choices"][0]["message"]
        return message["content"], message.get("tool_turns", [])

    assert turns() == (CALL, CALLED * MOST_CALLS)
    assert turns(tool_choice="none") == turns(tools=[]) == (CALL, [])


def test_what_a_model_is_told_of_its_tools_is_shown_and_tools_that_are_not_there_are_named(calling):
    for wrong, message in (
        ({"tools": [{"type": "calender"}]}, "no tool 'calender' on this server; did you mean 'calendar'?"),
        ({"n": 2}, "n is 2; with tools it is 1"),
        ({"tool_choice": "required"}, "tool_choice: input should be 'auto' or 'none'"),
    ):
        status, found, _ = calling.ask("/v1/chat/completions", CALCULATOR | wrong)
        assert status == 400 and found["error"]["message"] == message


def test_a_result_that_a_model_has_no_room_for_ends_the_stream_with_a_line(calling):
    told = {name: CALCULATOR[name] for name in ("model", "tools", "messages")}
    room = 4090 - len(calling.ask("/v1/chat/context", told)[1]["tokens"])
    long = [{"role": "user", "content": "x" * room}]
    status, found, _ = calling.ask("/v1/chat/completions", CALCULATOR | {"messages": long, "stream": True})
    last = found.rstrip().rpartition("data: ")[2]
    assert status == 200 and '"content": "42"' in found and "the model's context is 4,096" in last


# ---- what goes wrong ----

CHAT = {"model": "tiny", "messages": HI}
CHATS = [
    ({"messages": HI}, 400, "model is missing", "model"),
    ({**CHAT, "model": "tinny"}, 404, "no model 'tinny'; did you mean 'tiny'?", "model"),
    ({**CHAT, "temprature": 1}, 400, "no field 'temprature'; did you mean 'temperature'?", "temprature"),
    ({**CHAT, "temperature": "hot"}, 400, "temperature: input should be a valid number", "temperature"),
    ({**CHAT, "temperature": -1}, 400, "temperature is -1.0; it is a number of at least 0", None),
    ({**CHAT, "top_p": 0}, 400, "top_p is 0.0; it is above 0 and at most 1", None),
    ({**CHAT, "max_tokens": 0}, 400, "max_tokens is 0; it is at least 1", None),
    ({**CHAT, "stop": ["a"] * 17}, 400, "stop: value should have at most 16 items", "stop"),
    ({**CHAT, "messages": [{"role": "user"}]}, 400, "messages.0: content is missing", "messages"),
    ({**CHAT, "n": 0}, 400, "n: input should be greater than or equal to 1", "n"),
    ({**CHAT, "seed": -1}, 400, "seed is -1", None),
    ({**CHAT, "seed": 2**40}, 400, "seed is 1099511627776; it is 0 .. 4294967295", None),
    ({**CHAT, "top_k": -(2**70)}, 400, "top_k is -1180591620717411303424; it is at least 0", None),
    ({**CHAT, "stop": [""]}, 400, "a stop text is empty", None),
    ({**CHAT, "logit_bias": {"a": 1}}, 400, "logit_bias: it maps token ids to numbers", "logit_bias"),
    ({**CHAT, "logit_bias": {"999": 1}}, 400, "ids lie in 0 .. 256", None),
    ({**CHAT, "top_logprobs": 2}, 400, "top_logprobs comes with logprobs", "top_logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "less than or equal to 20", "top_logprobs"),
    ({**CHAT, "frequency_penalty": 0.5}, 400, "frequency_penalty is not supported", "frequency_penalty"),
    (
        {**CHAT, "tools": [{"type": "function"}]},
        400,
        "tools: a client's functions are not supported",
        "tools",
    ),
    ({**CHAT, "tools": [{"type": "calculator"}]}, 400, "no tool 'calculator' on this server", "tools"),
    ({**CHAT, "response_format": {"type": "json_object"}}, 400, "not supported", "response_format"),
    ({**CHAT, "messages": []}, 400, "messages: list should have at least 1 item", "messages"),
    ({**CHAT, "messages": [{"role": "robot", "content": ""}]}, 400, "messages.0.role", "messages"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts", "messages"),
    (
        {**CHAT, "messages": [{"role": "user", "content": "x" * 5000}]},
        400,
        "the model's context is 4,096",
        None,
    ),
    (b"{", 400, "the body is not JSON", None),
    (b"[" * 100_000, 400, "the body is not JSON", None),
    (b'{"model": "\\ud800"}', 400, "the body is not JSON", None),
    (b'{"temperature": NaN}', 400, "the body is not JSON", None),
    (b"7", 400, "the body: input should be a valid dictionary", None),
]
TEXTS = [
    ({"model": "tiny"}, 400, "prompt is missing", "prompt"),
    ({"model": "tiny", "prompt": ["a", 1]}, 400, "prompt: it is a text, a list of texts", "prompt"),
    ({"model": "tiny", "prompt": [1, -1]}, 400, "prompt: it is a text", "prompt"),
    ({"model": "tiny", "prompt": [300]}, 400, "the prompt has ids outside 0 .. 256", None),
    ({"model": "tiny", "prompt": ""}, 400, "the prompt is empty", None),
    ({"model": "tiny", "prompt": ["fine", ""], "stream": True}, 400, "the prompt is empty", None),
    ({"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1}, 400, "logprobs with echo", "echo"),
    ({"model": "tiny", "prompt": ["a"] * 65, "n": 2}, 400, "130 answers: one request asks for 128", "prompt"),
    ({"model": "tiny", "prompt": "a", "best_of": 2}, 400, "best_of is not supported", "best_of"),
]


WRONG = [("chat/completions", *row) for row in CHATS] + [("completions", *row) for row in TEXTS]


@pytest.mark.parametrize("path, body, status, message, param", WRONG, ids=[wrong[3] for wrong in WRONG])
def test_a_wrong_request_is_refused_in_one_line(web, path, body, status, message, param):
    code, found, _ = web.ask(f"/v1/{path}", body)
    error = found["error"]
    assert code == status and message in error["message"] and "\n" not in error["message"]
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_the_server_lives_on_after_them_and_what_asks_for_nothing_is_let_through(web, monkeypatch):
    nothing = {"presence_penalty": 0, "tools": None, "seed": None, "response_format": {"type": "text"}}
    nothing |= {"metadata": {"for": "a test"}, "service_tier": "auto", "user": "me"}
    assert web.ask("/v1/chat/completions", {**CHAT, **nothing})[0] == 200
    assert web.ask("/v1/nothing")[:2] == (404, web.ask("/v1/nothing")[1])
    assert web.ask("/v1/chat/completions")[0] == 405
    assert web.ask("/v1/chat/completions", CHAT, Content_Type="text/plain")[0] == 415
    monkeypatch.setattr(guards, "LARGEST", 10)
    assert web.ask("/v1/chat/completions", CHAT)[0] == 413
    with contextlib.closing(socket.create_connection(("127.0.0.1", web.port))) as raw:
        raw.sendall(b"no HTTP\r\n\r\n")
        assert b" 400 " in raw.recv(1000)


def test_roles_and_turns_of_newer_clients_are_those_they_stand_for(web):
    newer = [{"role": "developer", "content": "Be."}, {"role": "assistant", "content": None}]
    messages = [*newer, {"role": "user", "content": "hi", "name": "Ann"}]
    _, found, _ = web.ask("/v1/chat/context", {"model": "tiny", "messages": messages})
    assert found["text"] == "[s]Be.[a][u]hi[a]"


def test_a_full_line_is_said_to_and_what_stands_in_it_is_answered(web, monkeypatch):
    monkeypatch.setattr(worker, "LONGEST", 6)
    asked = {"temperature": 0, "logit_bias": {"120": 100}}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(web.chat, max_tokens=400, n=5, **asked)]
        until(lambda: web.batcher().waiting == 1)
        waiting.append(pool.submit(web.chat, max_tokens=400, n=5, **asked))
        until(lambda: web.batcher().waiting == 6)
        code, found, headers = web.ask("/v1/chat/completions", {**CHAT, **asked})
        assert code == 503 and "6 answers wait in line" in found["error"]["message"]
        assert found["error"]["type"] == "server_error" and headers["Retry-After"] == "1"
        for answer in waiting:
            assert [choice.message.content for choice in answer.result().choices] == ["x" * 400] * 5
    assert web.ask("/v1/chat/completions", {**CHAT, **asked})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_answered_no_longer(web, stream):
    body = json.dumps({**CHAT, "max_tokens": LONG, "n": 6, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", web.port))) as raw:
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        if stream:
            assert b" 200 " in raw.recv(100)
        until(lambda: web.batcher().busy)
    until(lambda: not web.batcher().busy)
    assert web.chat(max_tokens=3, temperature=0).usage.completion_tokens == 3


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def test_a_model_that_fails_is_said_to_and_answers_the_next(web, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    engine = web.batcher().engine
    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", broken)
        code, found, _ = web.ask("/v1/chat/completions", CHAT)
        assert code == 500 and "the model failed" in found["error"]["message"]
        _, found, _ = web.ask("/v1/chat/completions", {**CHAT, "stream": True})
        assert "the model failed" in found and "[DONE]" not in found
    assert web.ask("/v1/chat/completions", CHAT)[0] == 200


# ---- who may ask ----


def test_another_site_cannot_ask_through_the_browser_of_who_runs_it(web):
    for host in ("evil.example", f"127.0.0.1.evil.example:{web.port}", "[", ""):
        assert web.ask("/v1/models", Host=host)[0] == 403
        assert web.ask("/", Host=host)[0] == 403
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        assert web.ask("/v1/chat/completions", CHAT, Origin=origin)[0] == 403
    own = f"localhost:{web.port}"
    assert web.ask("/v1/models", Host=own, Origin=f"http://{own}")[0] == 200


def test_a_token_opens_the_api_and_nothing_else_does():
    with Web([Speaker(TINY)], token="open-sesame") as web:
        for given in (
            {},
            {"Authorization": "Bearer open"},
            {"Authorization": "Bearer öpen-sesame"},
            {"Authorization": "Basic open-sesame"},
        ):
            code, found, headers = web.ask("/v1/models", **given)
            assert code == 401 and found["error"]["code"] == "invalid_api_key"
            assert headers["WWW-Authenticate"] == "Bearer"
        right = {"Authorization": "Bearer open-sesame"}
        assert web.ask("/v1/models", Host="far.example", **right)[0] == 200
        assert web.ask("/", Host="far.example")[0] == 200


def test_a_token_may_stand_in_the_environment(command, monkeypatch):
    given = []

    def listen(host, port, token):
        given.append(token)
        raise UserError("heard")

    monkeypatch.setattr("llm_jax.inference.server.listen", listen)
    monkeypatch.setenv("LLM_JAX_TOKEN", "open-sesame")
    for flags in ([], ["--token=mine"]):
        assert command("llm_jax.chat", "--web", "--model=nowhere", *flags)[0] == 2
    assert given == ["open-sesame", "mine"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--host=0.0.0.0"], "give a --token=SECRET"),
        (["--host=0.0.0.0", "--token="], "--token is made of"),
        (["--port=99999"], "--port=99999"),
        (["--model="], "--model is missing"),
    ],
)
def test_where_it_may_not_be_served_is_said_before_a_model_is_opened(command, flags, message):
    code, _, err = command("llm_jax.chat", "--web", "--model=nowhere", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
