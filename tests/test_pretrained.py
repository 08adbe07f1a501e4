"""Training that goes on from a model: it starts as that, wherever it lies, and is a run like any other."""

import dataclasses
import json
import shutil
import subprocess
import sys
import uuid

import jax
import numpy as np
import pytest

from llm_jax import files, records, sharding
from llm_jax.config import UserError
from llm_jax.data import Bytes, Chat, SentencePiece, Tokenizer
from llm_jax.export import export
from llm_jax.inference.opening import open_model
from llm_jax.inference.pretrained import Pretrained, PretrainedTokenizer, content, widened
from llm_jax.models import ModelConfig
from llm_jax.models.lora import LoRA
from llm_jax.optimizers import AdamW
from llm_jax.pack import train_packed
from llm_jax.run import Checkpointing, Execution, Run, Tasks
from llm_jax.schedules import WSD
from llm_jax.sharding import MeshConfig
from llm_jax.train import train
from llm_jax.trunks import shared_steps

ALONE = Execution(mesh=MeshConfig(data=1))
STILL = AdamW(learning_rate=0.0)
TALK = {"messages": [{"role": "user", "content": "ab?"}, {"role": "assistant", "content": "cab"}]}


@pytest.fixture(scope="module")
def base(tiny_run, tmp_path_factory):
    """The folder of a run of forty steps, and the same model in a directory and in a file."""
    place = tmp_path_factory.mktemp("base")
    run = dataclasses.replace(tiny_run, execution=ALONE)
    train(run, place / "run")
    opened = open_model(place / "run")
    export(opened, place / "directory")
    export(opened, place / "file.gguf")
    return place


@pytest.fixture
def tuned(base, tiny_run):
    """A short run that goes on from the base, by default without a change."""

    def make(place="run", steps=2, model=None, **changes):
        execution = dataclasses.replace(ALONE, **changes.pop("execution", {}))
        run = dataclasses.replace(tiny_run, model=model or Pretrained(str(base / place)), execution=execution)
        return dataclasses.replace(run, **{"optimizer": STILL, "tokens": steps * 256} | changes)

    return make


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def conversations(folder, count=60):
    path = folder / "talks.jsonl"
    lines = [TALK | {"id": n} for n in range(count)]
    for n, line in enumerate(lines):
        line["messages"] = [TALK["messages"][0] | {"content": f"{n}?"}, TALK["messages"][1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_it_starts_as_a_run_in_a_bucket_and_takes_its_tokenizer(base, tiny_run, tuned, bucket, command):
    place = f"{bucket}/{uuid.uuid4().hex}"
    train(dataclasses.replace(tiny_run, execution=ALONE), place)
    run = tuned(model=ModelConfig.parse(place))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=Tokenizer.parse(place)))
    assert run.identity() == dataclasses.replace(run, model=Pretrained(str(base / "run"))).identity()
    result = train(run, f"{place}-tuned")
    whole = records.load_run(base / "run")["result"]
    assert result["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    there, here = open_model(base / "run"), open_model(f"{place}-tuned")
    equal(there.params, here.params)
    assert here.tokenizer.data == there.tokenizer.data
    out = f"--out={place}/s/scores.npz"
    assert command("llm_jax.score", f"--model={place}-tuned", "--text=ab", out)[0] is None
    assert len(np.load(files.path(place, "s/scores.npz").open("rb"))["ids"][0]) == 3
    with pytest.raises(UserError, match=r"no run at 'gs://.*/none': of a bucket, runs alone can be opened"):
        ModelConfig.parse(f"{bucket}/none").resolve(run.data)
    with pytest.raises(UserError, match=r"no run at 'gs://.*/t.json': of a bucket, runs alone can be opened"):
        Tokenizer.parse(f"{bucket}/t.json").size()


@pytest.mark.parametrize("place", ["run", "directory", "file.gguf"])
def test_it_starts_as_the_model_wherever_that_lies(base, tuned, tmp_path, place):
    """At a rate of zero nothing moves: neither the loss nor a bit of the parameters."""
    result = train(tuned(place), tmp_path / "run")
    whole = records.load_run(base / "run")["result"]
    assert result["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    there, here = open_model(base / place), open_model(tmp_path / "run")
    equal(there.params, here.params)
    assert (here.config, here.context) == (there.config, there.context)
    table = records.load_sweep(tmp_path)
    assert table["model.width"][0] == 32 and records.load_run(tmp_path / "run")["start"]["new_tokens"] == 0


def test_what_it_is_and_not_where_it_lies_decides_its_identity(base, tuned, tmp_path):
    for place in ("run", "directory"):
        shutil.copytree(base / place, tmp_path / place)
        moved = tuned(model=Pretrained(str(tmp_path / place)))
        assert moved.identity() == tuned(place).identity()
    assert tuned("run").identity() != tuned("directory").identity()
    before = content(str(tmp_path / "directory"))
    facts = tmp_path / "directory" / "config.json"
    facts.write_text(facts.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))
    assert content(str(tmp_path / "directory")) != before


def test_it_is_the_same_on_many_devices(tuned, tmp_path):
    many = {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}
    results = [
        train(tuned(steps=8, optimizer=AdamW(), execution=how), tmp_path / str(n))
        for n, how in enumerate(({}, many))
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_one_continues_bit_for_bit(base, tuned, tmp_path, lora):
    model = LoRA(Pretrained(str(base / "run")), rank=2) if lora else None
    keeps = {"checkpoint": Checkpointing(keep_steps=(3,))}
    run = tuned(steps=8, model=model, optimizer=AdamW(), execution=keeps)
    whole = train(run, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "result.json").unlink()
    (tmp_path / "part" / "checkpoints" / "00000008.json").unlink()
    again = train(run, tmp_path / "part")
    assert records.starts(tmp_path / "part")[-1]["resume_at"] == 3
    assert again["loss"] == whole["loss"] and again["train_loss"] == whole["train_loss"]
    equal(open_model(tmp_path / "part").params, open_model(tmp_path / "whole").params)


def test_runs_that_begin_as_one_model_share_their_first_steps(tuned):
    wsd = AdamW(schedule=WSD(warmup_steps=2, decay_fraction=0.25))
    short, long = (tuned(steps=steps, optimizer=wsd) for steps in (16, 32))
    assert shared_steps(short, long) == 13  # the last quarter begins at the full rate
    assert shared_steps(short, tuned("directory", steps=32, optimizer=wsd)) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_packed_members_start_from_it_too_each_at_its_rate(base, tuned, tmp_path, lora):
    model = LoRA(Pretrained(str(base / "run")), rank=2) if lora else None
    runs = [tuned(steps=8, model=model, optimizer=AdamW(learning_rate=rate)) for rate in (1e-3, 1e-2)]
    packed = train_packed(runs, [tmp_path / "0", tmp_path / "1"])
    alone = [train(run, tmp_path / f"alone-{n}") for n, run in enumerate(runs)]
    assert packed[0]["loss"] != packed[1]["loss"]
    for one, other in zip(packed, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_a_lora_is_opened_and_exported_merged(base, tuned, tmp_path):
    model = LoRA(Pretrained(str(base / "directory")), rank=2)
    train(tuned(steps=8, model=model, optimizer=AdamW(learning_rate=1e-2)), tmp_path / "run")
    opened, before = open_model(tmp_path / "run"), open_model(base / "directory")
    assert opened.config == before.config and set(opened.params) == set(before.params)
    equal(opened.params["embed"], before.params["embed"])
    moved = jax.tree.map(lambda x, y: abs(x - y).max(), opened.params["body"], before.params["body"])
    assert min(moved["0"]["mlp"].values()) > 1e-3
    for place in ("out", "out.gguf"):
        export(opened, tmp_path / place)
        equal(open_model(tmp_path / place).params, opened.params)


# ---- conversations, with special tokens that the model doesn't know ----


def test_new_tokens_begin_as_the_mean_of_all(base, tmp_path):
    place = str(shutil.copytree(base / "directory", tmp_path / "base"))
    data = Chat(
        (conversations(tmp_path),), tokenizer=PretrainedTokenizer(place), sequence_length=32, batch_size=4
    )
    run = Run(Pretrained(place), data, STILL, tokens=128, execution=ALONE)
    train(run, tmp_path / "run")
    start = records.load_run(tmp_path / "run")["start"]
    assert (start["new_tokens"], start["new_rows"]) == (2, "the mean of the others")
    opened, before = open_model(tmp_path / "run"), open_model(base / "directory")
    table, old = opened.params["embed"]["embedding"], before.params["embed"]["embedding"]
    assert opened.config.vocabulary == 259
    equal(table[:257], old)
    np.testing.assert_allclose(table[257:], np.broadcast_to(old.mean(0), (2, 32)), atol=1e-7)
    assert opened.tokenizer.stops == (258, 256)  # the turn's end, and the text's
    # Whose tokens are known by now: nothing new is made for a run that goes on from there.
    more = dataclasses.replace(
        run,
        model=Pretrained(str(tmp_path / "run")),
        data=dataclasses.replace(data, tokenizer=PretrainedTokenizer(str(tmp_path / "run")), template="own"),
    )
    assert more.data.vocabulary == 259 and more.model.record(more.data)["new_tokens"] == 0
    source = data.open()
    equal(source.rows(0, np.arange(4)), more.data.open().rows(0, np.arange(4)))
    other = dataclasses.replace(
        more.data, tokenizer=Bytes(), template="llama3"
    )  # its ids mean something there
    with pytest.raises(UserError, match="is not that of"):
        more.model.beginning(other, Bytes())
    # And the run is whole without the model that it began as, in a process of its own.
    shutil.rmtree(place)
    code = "import sys; from llm_jax.inference.opening import open_model; open_model(sys.argv[1]).encode('a')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)


def test_the_head_is_widened_too_and_rows_of_a_padded_table_stay():
    params = {"embed": {"embedding": np.arange(10.0).reshape(5, 2)}, "head": {"head": np.ones((2, 5))}}
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    wide = widened(params, 3, 4, mesh)
    equal(wide["embed"]["embedding"], np.array([[0, 1], [2, 3], [4, 5], [2, 3], [8, 9]], np.float32))
    assert widened(params, 3, 7, mesh)["head"]["head"].shape == (2, 7)
    assert widened(params, 5, 5, mesh) is params


# ---- the best checkpoint ----


def test_the_best_state_is_kept_through_kills_and_opened(tuned, tmp_path):
    """By a score that is best at step 6; the first attempt dies behind it."""
    keeps = Checkpointing(keep_last=1, every_steps=2, keep_best="distance", best_is="lowest")
    run = tuned(steps=14, optimizer=AdamW(), execution={"checkpoint": keeps, "evaluate_every_steps": 2})
    seen, dies = {}, [10]

    def hook(step, params):
        if step in dies:
            raise RuntimeError("killed")
        seen[step] = jax.device_get(params)
        return {"distance": abs(step - 6)}

    with pytest.raises(RuntimeError, match="killed"):
        train(run, tmp_path / "run", [hook])
    dies.clear()
    result = train(run, tmp_path / "run", [hook])
    assert records.starts(tmp_path / "run")[-1]["resume_at"] == 8
    assert result["best"] == {"metric": "distance", "step": 6, "value": 0.0}
    equal(open_model(tmp_path / "run").params, seen[6])
    assert content(str(tmp_path / "run")).endswith(", 6 steps")


# ---- what can't be done ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"place": "nowhere"}, r"no model at '.*nowhere': give a directory in Hugging Face's format"),
        ({"model": Pretrained()}, "model.path is empty; name a model: --config.model=runs/base"),
        ({"initial_scale": 2.0}, "initial_scale multiplies drawn parameters"),
        ({"execution": {"checkpoint": Checkpointing(keep_best="loss")}}, "say how often"),
        (
            {
                "execution": {
                    "checkpoint": Checkpointing(keep_best="letters/acuracy"),
                    "evaluate_every_steps": 1,
                    "tasks": Tasks(("letters",)),
                }
            },
            "no metric 'letters/acuracy' in this run's evaluations; did you mean 'letters/accuracy'",
        ),
        (
            {
                "execution": {
                    "checkpoint": Checkpointing(keep_best="arithmetic:tool/called"),
                    "evaluate_every_steps": 1,
                    "tasks": Tasks(("arithmetic:tool",)),
                }
            },
            r"arithmetic:tool/called: nothing says which value is best; add .*best_is=highest \(or lowest\)",
        ),
        (
            {"execution": {"checkpoint": Checkpointing(keep_best="lss"), "evaluate_every_steps": 1}},
            "no metric 'lss' in this run's evaluations; did you mean 'loss'",
        ),
    ],
    ids=str,
)
def test_what_can_not_be_begun_is_one_line(tuned, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(tuned(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused_before_anything_is_written(base, tuned, tmp_path, corpus):
    run = tuned("directory")
    data = dataclasses.replace(run.data, tokenizer=SentencePiece(vocabulary=280))
    with pytest.raises(UserError, match=r"\(sentencepiece, 280 ids\) is not that of .*directory \(257 ids\)"):
        train(dataclasses.replace(run, data=data), tmp_path / "run")
    shutil.copytree(base / "directory", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    wider = dataclasses.replace(run, model=Pretrained(str(tmp_path / "bare")), data=data)
    with pytest.raises(UserError, match="has 257 token ids and no tokenizer, and the data has 280"):
        train(wider, tmp_path / "run")
    chat = Chat((conversations(tmp_path),), tokenizer=Bytes(), sequence_length=32, batch_size=4)
    lora = dataclasses.replace(run, model=LoRA(run.model), data=chat, tokens=128)
    with pytest.raises(UserError, match=r"2 special tokens of data.template are new .* --config.model.whole"):
        train(lora, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_not_ended_is_nothing_to_begin_with(base, tuned, tmp_path, command):
    shutil.copytree(base / "run", tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    with pytest.raises(UserError, match="half has not ended: what began it continues it"):
        tuned(model=Pretrained(str(tmp_path / "half"))).identity()
    where = "--config=experiments/isoflop.py:smoke"
    code, out, err = command("llm_jax.train", where, f"--config.model={tmp_path / 'half'}")
    assert (code, out) == (2, "") and err.startswith("error: model.path: the run ") and err.count("\n") == 1
