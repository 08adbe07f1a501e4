"""The chat sends its whole context, shows it, and goes on after mistakes; the commands around it."""

import dataclasses
import functools
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import parameters

from llm_jax import manifest
from llm_jax.chat import Chat, beside, talk
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError, replace
from llm_jax.inference.batching import Batcher
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import open_model
from llm_jax.inference.tools import crowded, toolbox
from llm_jax.interop import gguf, huggingface
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.models.transformer import Transformer
from llm_jax.score import read_ids, score

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
MODEL = Transformer(layers=1, width=16, heads=2, vocabulary=257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that has learned nothing, with a tokenizer, a chat template and a context of 96 bytes."""
    place = tmp_path_factory.mktemp("models") / "tiny"
    letters = dataclasses.replace(tokenizers.of_bytes(), chat_template=TEMPLATE, context=96)
    huggingface.save(place, MODEL, parameters(MODEL.build()), letters)
    return place


@pytest.fixture(scope="module")
def speaker(folder):
    return Speaker(open_model(folder))


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The folder of two steps of a run."""
    from llm_jax.train import train

    place = tmp_path_factory.mktemp("runs") / "mine"
    two = replace(replace(tiny_run, "tokens", 2 * 8 * 32), "execution.mesh.data", 1)
    train(replace(two, "optimizer.average", 0.5), place)
    return place


def talked(speakers, lines, **options):
    chat = Chat(speakers, max_tokens=5, out=io.StringIO(), **options)
    talk(chat, io.StringIO("".join(f"{line}\n" for line in lines)))
    return chat, chat.out.getvalue()


def test_each_turn_sends_the_whole_conversation_and_context_shows_it(speaker):
    chat, shown = talked([speaker], ["/system Be", "hi", "more", "/context", "/quit", "never"])
    (first, [[one]]), (second, [[two]]) = chat.turns
    one, two = one["content"], two["content"]
    assert (first, second) == ("hi", "more")
    sent = f"[s]Be[u]hi[a]{one}[u]more[a]{two}[u]…[a]"
    assert speaker.text(chat.messages(0, "…")) == sent and sent in shown
    assert speaker.opened.tokenizer.decode(speaker.ids(chat.messages(0, "…"))) == sent
    assert "5 tokens" in shown and "tokens/s" in shown


def test_settings_change_and_an_answer_is_the_same_for_the_same_seed(speaker):
    lines = ["/set temperature=1.5", "/set seed=4", "hi", "/retry", "/reset", "hi", "/set seed=5", "hi"]
    chat, shown = talked([speaker], lines)
    assert chat.sampling.temperature == 1.5 and chat.sampling.seed == 5
    assert len(chat.turns) == 2 and "temperature=1.5" in shown


def test_a_mistake_is_one_line_and_the_chat_goes_on(speaker, capsys):
    lines = [
        "/retyr",
        "/set top_p=3",
        "/set topp=1",
        "/set temperature=hot",
        "/retry",
        "x" * 200,
        "/set max_tokens=0",
    ]
    lines.append("hi")
    chat, _ = talked([speaker], lines)
    errors = capsys.readouterr().err.splitlines()
    assert [said for said, _ in chat.turns] == ["hi"] and len(errors) == 7
    assert "did you mean '/retry'" in errors[0] and "top_p is 3" in errors[1] and "'top_p'" in errors[2]
    assert errors[3] == "error: /set temperature: 'hot' is not a number"
    assert "the model's context is 96" in errors[5] and "max_tokens is 0; it is at least 1" in errors[6]


def test_two_models_answer_side_by_side_each_with_its_own_past(speaker, run):
    base = Speaker(open_model(run))
    chat, shown = talked([speaker, base], ["hi", "/context"])
    ((_, turns),) = chat.turns
    answers = [turn["content"] for (turn,) in turns]
    assert base.template is None and base.text(chat.messages(1, "x")).startswith(
        "<|endoftext|>User: hi\nAssistant: "
    )
    assert answers[1] in base.text(chat.messages(1)) and answers[0] in speaker.text(chat.messages(0))
    assert "tiny" in shown and "mine" in shown and " | " in shown


def test_what_is_shown_is_what_is_sent(speaker, run):
    for who in (speaker, Speaker(open_model(run))):
        messages = [{"role": "user", "content": "hi"}]
        shown = b"".join(map(who.opened.tokenizer.spelling, who.ids(messages).tolist()))
        assert shown.decode() == who.text(messages)


def test_each_model_is_as_fast_as_it_is_alone(folder, monkeypatch):
    now = [0.0]

    def step(batcher, took):
        now[0] += took
        return Batcher.step(batcher)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    messages = [{"role": "user", "content": "hi"}]
    replies = [Speaker(open_model(folder)).reply(messages, max_tokens=5) for _ in range(2)]
    for reply, took in zip(replies, (1.0, 0.1), strict=True):
        monkeypatch.setattr(reply._batcher, "step", functools.partial(step, reply._batcher, took))
    for _ in zip(*replies, strict=True):
        pass
    assert "5 tokens, 1.0 tokens/s, first after 1.00 s" in str(replies[0])
    assert "5 tokens, 10.0 tokens/s, first after 0.10 s" in str(replies[1])


def test_columns_keep_their_width():
    rows = beside(["one", "two"], ["a long text that is wrapped", "short\n\nlines"], 23)
    assert rows[0] == "one        | two" and max(map(len, rows)) <= 23 and rows[1] == "a long     | short"


def test_a_run_is_opened_with_its_newest_parameters_and_its_tokenizer(run, tiny_run):
    opened = open_model(run)
    assert opened.context == 32 and opened.encode("ab").tolist() == [256, 97, 98]
    shapes = jax.eval_shape(opened.config.build().init, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), opened.params, shapes)
    stored = Checkpoints(run / "checkpoints")
    names = manifest.read(run / "checkpoints" / "00000002")["arrays"]
    place = next(name for name in names if name.endswith("/average/norm/scale"))
    average = stored.restore_params(shapes, place.removesuffix("/norm/scale"))
    jax.tree.map(np.testing.assert_array_equal, opened.params, average)  # what was evaluated
    assert not np.array_equal(average["norm"]["scale"], stored.restore_params(shapes)["norm"]["scale"])
    narrow = open_model(run, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.params)} == {"bfloat16"}
    wide, scores = (score(one, np.array([[256, 97, 98]])) for one in (opened, narrow))
    np.testing.assert_allclose(scores.logprobs[:, 1:], wide.logprobs[:, 1:], atol=0.05)
    assert narrow.config.dtype == "bfloat16" and scores.logits.dtype == np.float32


def test_a_gguf_file_is_opened_as_what_it_was_written_from(folder, tmp_path):
    here = open_model(folder)
    gguf.save(tmp_path / "tiny.gguf", here.config, here.params, here.tokenizer, kind="F32")
    opened = open_model(tmp_path / "tiny.gguf")
    assert opened.context == 96 and opened.encode("ab").tolist() == here.encode("ab").tolist()
    assert opened.tokenizer.chat_template == TEMPLATE
    jax.tree.map(np.testing.assert_array_equal, opened.params, here.params)


def test_what_is_no_model_or_no_text_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        open_model(tmp_path)
    opened = open_model(folder)
    for ids, message in [
        (np.zeros((1, 97), int), "97 tokens, and the model's context is 96"),
        (np.array([[300]]), "ids lie in 0"),
        (np.zeros((1, 0), int), "nothing to read"),
        (np.zeros((1, 2)), "they are integers"),
    ]:
        with pytest.raises(UserError, match=message):
            score(opened, ids)
    with pytest.raises(UserError, match="no tokenizer"):
        opened._replace(tokenizer=None).encode("x")
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "cube.npy", np.zeros((1, 2, 3)))
    for name in ("ids.npy", "cube.npy", "none.npy"):
        with pytest.raises(UserError, match=name):
            read_ids(str(tmp_path / name))


def process(name, *arguments, text=""):
    program = [sys.executable, "-m", f"llm_jax.{name}", *map(str, arguments)]
    return subprocess.run(program, input=text, capture_output=True, text=True)


def test_the_commands_score_generate_and_chat(folder, tmp_path):
    opened, out = open_model(folder), tmp_path / "out.npz"
    np.save(tmp_path / "ids.npy", np.array([[104, 105, 33], [1, 2, 3]]))
    done = process("score", f"--model={folder}", f"--ids={tmp_path / 'ids.npy'}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    saved, here = np.load(out), score(opened, np.load(tmp_path / "ids.npy"))
    assert saved["logits"].shape == (2, 3, 257) and saved["logits"].dtype == np.float32
    np.testing.assert_allclose(saved["logprobs"], here.logprobs, atol=1e-6)
    np.testing.assert_allclose(
        saved["logprobs"][0, 1], jax.nn.log_softmax(saved["logits"][0, 0])[105], atol=1e-6
    )
    assert "'i'" in done.stdout and "nats a token over 2" in done.stdout

    flags = ["--prompt=hi", "--n=2", "--temperature=1", "--max_tokens=4", "--candidates=2", "--json"]
    done = process("generate", f"--model={folder}", *flags)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(answers) == 2, done.stderr
    assert all(len(token["top"]) == 2 for answer in answers for token in answer["tokens"])

    done = process("chat", f"--model={folder}", "--max_tokens=3", text="hi\n/context\n")
    assert done.returncode == 0 and "[u]hi[a]" in done.stdout, done.stderr


@pytest.mark.parametrize("flag", ["--max_tokens=0", "--slots=0", "--stop="])
def test_what_no_answer_could_keep_to_is_refused_before_the_chat_begins(folder, command, flag):
    code, _, err = command("llm_jax.chat", f"--model={folder}", "--web", "--port=0", flag)
    assert code == 2 and flag.strip("-").partition("=")[0] in err and err.count("\n") == 1


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(folder):
    done = process("generate", f"--model={folder}", "--prompt=x", "--top_p=7")
    assert done.returncode == 2
    assert done.stderr == "error: top_p is 7.0; it is above 0 and at most 1\n"


def test_a_score_of_nothing_and_a_file_that_is_a_folder_are_refused_before_a_model_is_read(tmp_path, command):
    for flag, wrong in {"--text=": "--text is empty", f"--out={tmp_path}": f"{tmp_path} is a folder"}.items():
        code, out, err = command("llm_jax.score", "--model=none", "--text=a", flag)
        assert (code, out) == (2, "") and wrong in err and err.count("\n") == 1


def test_the_commands_spread_a_model_over_devices(folder, tmp_path, monkeypatch, command):
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, *a: steps.append((self.params, a[0])) or step(self, *a))
    answers, flags = [], [f"--model={folder}", "--max_tokens=4"]
    for mesh in ([], ["--mesh=tensor=2,fsdp=2"]):
        code, out, err = command("llm_jax.generate", *flags, "--prompt=hi", *mesh)
        assert not code, err
        params, state = steps.pop()
        out_path = tmp_path / f"{len(answers)}.npz"
        assert command("llm_jax.score", flags[0], "--text=hi", f"--out={out_path}", *mesh)[0] is None
        answers.append((out, np.load(out_path)["logits"]))
        devices = [len(leaf.sharding.device_set) for leaf in jax.tree.leaves((params, state))]
        assert set(devices) == {4 if mesh else 1}
    assert answers[0][0] == answers[1][0]
    np.testing.assert_allclose(answers[0][1], answers[1][1], atol=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    code, out, err = command("llm_jax.chat", *flags, "--mesh=tensor=2")
    assert not code and "4 tokens" in out, err
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(steps[-1])} == {2}
    for wrong, message in [("rows=2", "'rows' is not data=N"), ("tensor=64", "needs 64 devices")]:
        code, _, err = command("llm_jax.score", flags[0], "--text=hi", f"--mesh={wrong}")
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_is_named_by_its_folder_wherever_it_is_asked_from(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_model(".").name == "tiny"


def test_tools_that_take_most_of_a_context_are_told_before_the_first_turn(folder):
    tight, tools = Speaker(open_model(folder)), toolbox(["calculator"])
    with pytest.raises(
        UserError, match=r"tiny: the tools' description takes 323 tokens of a context of 96: name"
    ):
        crowded(tight, tools)
    assert crowded(tight, {}) == ""
    for context, told in ((600, True), (700, False)):
        tight.opened = tight.opened._replace(context=context)
        assert bool(crowded(tight, tools)) == told
