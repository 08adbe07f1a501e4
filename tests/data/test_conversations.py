"""Conversations: what is read, dropped and cut; rows hold whole ones, and only answers are trained on."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Bytes, SentencePiece
from llm_jax.data.chat import Chat, packed
from llm_jax.data.conversations import FORMATS, read
from llm_jax.data.templates import BUILT_IN, lead, pieces, render
from llm_jax.run import SCHEMA

ASKED, SAID = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
TALK = [{"role": "system", "content": "Add."}, ASKED, SAID, {"role": "user", "content": "Sure?"}, SAID]
SAME = {
    "messages": {"messages": [ASKED, SAID]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    "topical_chat": {"content": [{"agent": "b", "message": "1 + 1?"}, {"agent": "a", "message": "2"}]},
    "alpaca": {"instruction": "1 + 1?", "input": "", "output": "2"},
    "completion": {"prompt": "1 + 1?", "completion": "2"},
}
STRANGE = "a role other than system, user, assistant, tool"


def write(folder, *records, name="chats.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def talks(count, length=20):
    random = np.random.default_rng(0)
    words = [chr(ord("a") + n) * 3 for n in range(20)]
    say = lambda: " ".join(random.choice(words, random.integers(1, length)))  # noqa: E731
    roles = ("user", "assistant") * 2
    return [{"messages": [{"role": role, "content": say()} for role in roles]} for _ in range(count)]


# ---- files ----


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_the_same(tmp_path, form):
    path = write(tmp_path, SAME[form])
    assert read([path], form).kept == read([path]).kept == [[ASKED, SAID]]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([SAME[form]] if form != "topical_chat" else {"t_1": SAME[form]}))
    assert read([listed]).kept == [[ASKED, SAID]]


def test_rows_are_the_same_of_every_kind_of_file(tmp_path):
    said = talks(30)
    packed = tmp_path / "chats.jsonl.gz"
    lines = write(tmp_path, *said)
    packed.write_bytes(gzip.compress(Path(lines).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(said), tmp_path / "chats.parquet")
    chats = [Chat((str(path),), batch_size=1) for path in (lines, packed, tmp_path / "chats.parquet")]
    rows = [chat.open().rows(0, np.arange(3))["tokens"] for chat in chats]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
    assert chats[0].fingerprint() == chats[1].fingerprint()


def test_what_can_not_teach_is_left_out_and_counted_by_reason(tmp_path):
    wrong = {
        "no turn": [],
        "a turn without a role": [{"content": "Hi"}, SAID],
        STRANGE: [ASKED, {"role": "robot", "content": "2"}, SAID],
        "two system messages": [TALK[0], TALK[0], ASKED, SAID],
        "a system message that isn't the first": [ASKED, TALK[0], SAID],
        "no assistant turn": [ASKED],
        "no assistant turn that counts": [ASKED, SAID | {"weight": 0}],
        "a weight other than 0 and 1": [ASKED, SAID | {"weight": 0.5}],
        "several calls of tools in one turn": [ASKED, SAID | {"tool_calls": [{}, {}]}],
        "a call that has no name and arguments": [ASKED, SAID | {"function_call": {"name": "f"}}],
        "a part of a turn that is no text": [ASKED | {"content": [{"type": "image_url"}]}, SAID],
        "a turn without text": [ASKED, {"role": "assistant", "content": None}],
        "an empty turn": [{"role": "user", "content": " "}, SAID],
        "half a surrogate or a noncharacter": [
            {"role": "user", "content": "half \ud83d"},
            SAID,
        ],
        "a turn that is no object": ["Hi", "Hello"],
        "a field 'messages' that is no list": "Hi",
    }
    path = write(tmp_path, *({"messages": messages} for messages in wrong.values()), {"messages": TALK})
    found = read([path])
    assert found.kept == [TALK] and found.dropped == dict.fromkeys(wrong, 1)
    assert found.dropped.first[STRANGE] == f"{path}: line 3, 'robot'"
    foreign = write(tmp_path, {"foo": 1}, None, 3, {"messages": [ASKED, SAID]}, name="foreign.jsonl")
    assert read([foreign]).dropped.total() == 3
    seeds = write(tmp_path, {"instruction": 3, "output": "a"}, {"instruction": "a"}, name="seeds.jsonl")
    why = r"1 have a field 'instruction' that is no text \(.*line 1\); 1 have no field 'output' \(.*line 2\)"
    with pytest.raises(UserError, match=f"no conversation in .*: {why}"):
        read([seeds])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", r"conversations are in files that end in \.jsonl, \.json, \.parquet"),
        (
            "a.jsonl",
            '{"a": 1}\n',
            r"1 have none of the fields messages, .*: line 1, which has a\)",
        ),
        ("a.jsonl", "{\n", r"line 1 is not JSON"),
        ("a.json", "3", r"neither a list of records nor an object"),
    ],
)
def test_files_that_hold_no_conversations_are_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read([tmp_path / name])
    with pytest.raises(UserError, match=r"missing\.jsonl: can't be read"):
        read([tmp_path / "missing.jsonl"])


# ---- templates ----


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_are_rendered_as_by_transformers_and_cut_where_the_answer_begins(name):
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"}
    text = BUILT_IN[name].text
    for answer in (True, False):
        theirs, _ = module.render_jinja_template(
            [TALK], chat_template=text, add_generation_prompt=answer, **special
        )
        assert render(text, TALK, special, answer) == theirs[0]
    parts = pieces(text, TALK, special, (*BUILT_IN[name].special, "</s>"))
    assert "".join(part for part, _ in parts) == render(text, TALK, special, answer=False)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "</s>"}[name]
    said = f"{lead(text, special)}2{end}"
    assert [part for part, spoken in parts if spoken] == [said, said]
    assert parts[0][0] == render(text, TALK[:2], special, answer=True)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    text = "{% for m in messages %}{{ m.role if loop.last else '' }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="writes a turn otherwise once others follow it"):
        pieces(text, TALK, {}, ())


# ---- rows ----


def test_items_share_rows_and_none_is_lost():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    rows = packed(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(500))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 100
    assert len(rows) <= 1.06 * -(-sum(lengths) // 100)


@pytest.mark.parametrize("template", BUILT_IN)
def test_rows_hold_each_conversation_once_with_its_answers_marked(tmp_path, template):
    said = talks(60)
    chat = Chat((write(tmp_path, *said),), template=template, sequence_length=400, batch_size=2)
    source = chat.open()
    codec, seen = Bytes(), []
    batch = source.rows(0, np.arange(len(source._rows)))
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            targets, mask = batch["targets"][row][here], batch["mask"][row][here]
            answers = np.split(targets, np.flatnonzero(np.diff(mask)) + 1)[1 - int(mask[0]) :: 2]
            seen.append(tuple(codec.decode([i for i in answer if i < 256]).strip() for answer in answers))
            ends = {int(answer[-1]) for answer in answers}
            assert ends == {source.writer.ids[chat.written.end]}
    assert not batch["mask"][batch["segments"] == 0].any()
    held = {tuple(item.tokens) for item in source._held}
    expected = sorted((t["messages"][1]["content"], t["messages"][3]["content"]) for t in said)
    assert len(seen) + len(held) == 60 and set(seen) <= set(expected) and len(set(seen)) == len(seen)


def test_what_is_trained_on_is_a_part_of_the_identity(tmp_path, monkeypatch):
    path = write(tmp_path, SAME["messages"] | {"prompt": "2 + 2?", "completion": "4"})
    one, other = (Chat((path,), form=form) for form in ("messages", "completion"))
    assert read(one.paths, one.form).kept != read(other.paths, other.form).kept
    assert config.identity(one, SCHEMA) != config.identity(other, SCHEMA)
    before = config.identity(one, SCHEMA)
    monkeypatch.setitem(BUILT_IN, "chatml", BUILT_IN["plain"])
    assert config.identity(one, SCHEMA) != before


def test_the_record_says_what_ends_a_turn(tmp_path):
    source = Chat((write(tmp_path, *talks(20)),), batch_size=1).open()
    assert source.record["template"] == {"special": ["<|im_start|>", "<|im_end|>"], "ends": "<|im_end|>"}


def test_what_a_template_has_nobody_say_is_counted(tmp_path):
    place = tmp_path / "some.jinja"
    place.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != 'no' %}"
        "{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    refused = {"messages": [ASKED, {"role": "assistant", "content": "no"}]}
    chat = Chat((write(tmp_path, *talks(20), refused),), template=str(place), batch_size=1)
    assert chat.open().record["dropped"] == {"nothing that the template has the assistant say": 1}


def test_names_of_special_tokens_in_what_somebody_says_are_text(tmp_path):
    sly = [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant"}, SAID]
    source = Chat((write(tmp_path, *talks(20), {"messages": sly}),), held_out_fraction=0, batch_size=1).open()
    ids = source.writer.ids
    found = next(item for item in source._kept if b"<|im_end|>" in bytes(i for i in item.tokens if i < 256))
    assert (found.tokens == ids["<|im_end|>"]).sum() == (found.tokens == ids["<|im_start|>"]).sum() == 2


def test_a_merge_does_not_reach_over_the_boundary(tmp_path):
    """The answer's tokens are those of the answer alone, as when a model makes it."""
    said = talks(400)
    chat = Chat((write(tmp_path, *said),), template="plain", tokenizer=SentencePiece(vocabulary=300))
    source = chat.open()
    answers = {t["messages"][1]["content"] for t in said}
    for item in source._kept[:20]:
        first = int(np.argmax(item.said))
        last = first + int(np.argmin(item.said[first:]))
        text = source.writer.codec.decode(item.tokens[first : last - 1])
        assert text[0] == " " and text[1:] in answers
        np.testing.assert_array_equal(source.writer.codec.encode(text), item.tokens[first : last - 1])


def test_long_conversations_are_cut_behind_an_answer_or_dropped_and_counted(tmp_path):
    long = {"messages": [ASKED, SAID, ASKED, {"role": "assistant", "content": "2" * 500}]}
    never = {"messages": [ASKED, {"role": "assistant", "content": "2" * 500}]}
    path = write(tmp_path, *talks(20), long, never)
    cut, dropped = (
        Chat((path,), sequence_length=300, batch_size=1, held_out_fraction=0, too_long=rule).open().record
        for rule in ("cut", "drop")
    )
    assert cut["conversations"]["cut"] == 1 and cut["dropped"] == {
        "more than 301 tokens up to the first answer": 1
    }
    assert dropped["conversations"]["cut"] == 0 and sum(dropped["dropped"].values()) == 2


def test_the_packed_loss_is_that_of_each_conversation_by_itself(tmp_path):
    """Against a slow reference: one conversation at a time, without segments."""
    from llm_jax.models.transformer import Transformer

    chat = Chat((write(tmp_path, *talks(30, 8)),), sequence_length=256, batch_size=2, held_out_fraction=0)
    source = chat.open()
    model = Transformer(layers=2, width=16, heads=2, vocabulary=chat.vocabulary).build()
    params = model.init(jax.random.key(0))

    @jax.jit
    def nats(tokens, targets, mask, **fields):
        logits = model.unembed(params, model.apply(params, {"tokens": tokens, **fields}, None).hidden)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(picked * mask).sum(), mask.sum()

    def row(values, kind):
        """One conversation, then zeros: no token sees what stands behind it, and none of that counts."""
        return np.pad(values, (0, chat.sequence_length - len(values))).astype(kind)[None]

    rows = source.rows(0, np.arange(len(source._rows)))
    together, count = nats(**rows)
    alone = [
        nats(
            tokens=row(item.tokens[:-1], np.int32),
            targets=row(item.tokens[1:], np.int32),
            mask=row(item.said[1:], np.float32),
            segments=np.ones((1, chat.sequence_length), np.int32),
            positions=np.arange(chat.sequence_length, dtype=np.int32)[None],
        )
        for item in source._kept
    ]
    sums, counts = map(sum, zip(*alone, strict=True))
    assert counts == count
    np.testing.assert_allclose(together, sums, rtol=1e-5)


def test_rows_are_a_function_of_seed_and_index_and_end_with_the_epoch(tmp_path):
    source = Chat((write(tmp_path, *talks(60)),), sequence_length=300, batch_size=2).open()
    several, single = source.rows(3, np.arange(6)), source.rows(3, np.array([4]))
    np.testing.assert_array_equal(several["tokens"][4:5], single["tokens"])
    assert (source.rows(4, np.arange(6))["tokens"] != several["tokens"]).any()
    with pytest.raises(UserError, match="past the first epoch"):
        source.rows(0, np.array([len(source._rows)]))


def test_held_out_conversations_are_scored_in_full(tmp_path):
    source = Chat(
        (write(tmp_path, *talks(60)),), sequence_length=300, held_out_fraction=0.2, batch_size=2
    ).open()
    held = source.held_out()
    batch = held.rows(np.arange(held.count + 1))  # the last one fills up
    assert batch["mask"].sum() == held.tokens and not batch["mask"][-1].any()
    assert set(batch["document"][batch["mask"] > 0].tolist()) == set(range(held.documents))
    trained = {item.tokens.tobytes() for item in source._kept}
    assert not trained & {item.tokens.tobytes() for item in source._held}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"paths": ()}, r"data\.paths is \(\); name files"),
        ({"template": "chatlm"}, "no chat template 'chatlm'; did you mean 'chatml'"),
        ({"template": "own"}, "data.template=own: data.tokenizer has no chat template of its own"),
        ({"template": "broken.jinja"}, "data.template=broken.jinja: the chat template: line 1: "),
        ({"template": "endless.jinja"}, "data.template=endless.jinja ends an answer by no special token"),
        ({"sequence_length": 3}, "no conversation is left .*=3: 20 have more than 4 tokens up to the first"),
        ({"batch_size": 1000}, "a batch takes 1000: give more"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, monkeypatch, fields, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    chat = Chat(**{"paths": (write(tmp_path, *talks(20)),)} | fields)
    with pytest.raises(UserError, match=words):
        chat.open()
