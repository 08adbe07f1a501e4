"""What other tools write otherwise in conversations: the same is read, and calls are as a chat hears them."""

import json
from types import SimpleNamespace

import pytest

from llm_jax.config import UserError
from llm_jax.data.chat import Chat
from llm_jax.data.conversations import read
from llm_jax.inference import tools

ASKED, SAID = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
TOLD = {"role": "system", "content": "Add."}
PAIR = [{"from": "user", "value": "1 + 1?"}, {"from": "chatgpt", "value": "2"}]
WITH_SYSTEM = [{"from": "system", "value": "Add."}, *PAIR]
PARTS = [{"type": "text", "text": "1 + 1?"}]


def written(folder, record, name="chats.jsonl", form="{}"):
    (folder / name).write_text(form.format(json.dumps(record)))
    return str(folder / name)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASKED | {"content": PARTS}, SAID]}, [ASKED, SAID]),
        ({"conversations": [ASKED, SAID]}, [ASKED, SAID]),
        ({"conversations": PAIR, "system": "Add."}, [TOLD, ASKED, SAID]),
        ({"conversations": WITH_SYSTEM, "system": "Add."}, [TOLD, ASKED, SAID]),
        ({"prompt": [ASKED], "completion": [SAID]}, [ASKED | {"weight": 0}, SAID]),
        ({"instruction": "1 + 1?", "output": "2", "history": [["1 + 1?", "2"]]}, [ASKED, SAID] * 2),
    ],
)
def test_what_is_written_otherwise_says_the_same(tmp_path, record, expected):
    assert read([written(tmp_path, record)]).kept == [expected]


@pytest.mark.parametrize("form", ["\ufeff{}", '{{"version": 1, "data": [{}]}}'])
def test_a_file_may_be_one_record_hold_them_under_data_or_begin_with_a_byte_order_mark(tmp_path, form):
    record = {"messages": [ASKED, SAID]}
    assert read([written(tmp_path, record, "chats.json", form)]).kept == [[ASKED, SAID]]


SPEC = tools.TOOLS["calculator"].told
CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}
AS_TEXT = CALL | {"arguments": json.dumps(CALL["arguments"])}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": AS_TEXT}]}
CALLED_ONCE = {"role": "assistant", "content": "", "function_call": AS_TEXT}
SHARED = [{"from": "human", "value": "1 + 1?"}, {"from": "function_call", "value": json.dumps(CALL)}]
SHARED += [{"from": "observation", "value": "2"}, {"from": "gpt", "value": "2"}]


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [ASKED, CALLED, {"role": "tool", "content": "2"}, SAID],
            "tools": [{"type": "function", "function": SPEC}],
        },
        {"messages": [ASKED, CALLED_ONCE, {"role": "function", "content": "2"}, SAID], "functions": [SPEC]},
        {"conversations": SHARED, "tools": json.dumps([SPEC])},
    ],
)
def test_tools_and_their_calls_are_taught_as_a_chat_tells_and_hears_them(tmp_path, record):
    heard = tools.heard(SimpleNamespace(text=f"<T_C>{json.dumps(CALL)}", stopped_at="</T_C>"), tools.TOOLS)
    told = tools.introduced([ASKED, *heard, SAID], tools.toolbox(["calculator"]))
    assert read([written(tmp_path, record)]).kept == [told]
    with pytest.raises(UserError, match="tools that are no list of names, descriptions and parameters"):
        read([written(tmp_path, {**record, "tools": "calculator"})])


WRAPPED = """\
{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", ["chatml", "wrapped.jinja"])
def test_a_turn_of_weight_0_is_read_and_not_trained_on(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrapped.jinja").write_text(WRAPPED)
    record = {"messages": [ASKED, {"role": "assistant", "content": "3", "weight": 0}, ASKED, SAID]}
    path = written(tmp_path, record)
    kept = Chat((path,), template=template, batch_size=1, held_out_fraction=0.0).open()._kept[0]
    assert [chr(number) for number in kept.tokens[kept.said] if number < 256] == ["2"]
    assert ord("3") in kept.tokens


def test_a_run_begins_with_what_was_kept_dropped_and_cut(tmp_path):
    record = {"messages": [ASKED, SAID]}
    wrong = {"messages": [TOLD, TOLD, ASKED, SAID]}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (record, wrong, record)))
    source = Chat((str(path),), batch_size=1, held_out_fraction=0.0).open()
    why = f"1 have two system messages (first {path}: line 2)"
    assert source.notes == (f"2 conversations, 0 more held out, 0 cut, 1 dropped: {why}",)
