"""What the export command writes is the same model in the tools that read it."""

import dataclasses
import json
import shutil

import gguf as package
import jax
import numpy as np
import pytest
import safetensors.numpy
from reference import FIXTURES
from test_gguf import llama_cpp

from llm_jax.config import UserError, replace
from llm_jax.export import export
from llm_jax.inference.batching import Batcher, Request, complete
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import open_model
from llm_jax.models import Layout
from llm_jax.models.parametrization import MuP

TEXT = "abc fade"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The folder of a run of forty steps."""
    from llm_jax.train import train

    place = tmp_path_factory.mktemp("runs") / "mine"
    train(replace(tiny_run, "execution.mesh.data", 1), place)
    return place


@pytest.fixture(scope="module")
def greedy(run):
    """The ids of a text as the run begins it, and how the run continues them."""
    opened = open_model(run)
    engine = Engine(opened.config, opened.params, layout=Layout(unroll=False, attention="reference"))
    prompt = opened.encode(TEXT)
    return prompt.tolist(), complete(Batcher(engine, 1), [Request(prompt, max_tokens=16)])[0].ids


def exported(command, run, place, *more):
    code, out, err = command("llm_jax.export", f"--model={run}", f"--to={place}", *more)
    assert code is None and str(place) in out, err
    return place


def test_a_run_is_the_same_model_in_a_directory_and_in_a_gguf_file(run, command, tmp_path):
    here = open_model(run)
    folder = exported(command, run, tmp_path / "mine")
    for place in (folder, exported(command, folder, tmp_path / "mine.gguf")):
        there = open_model(place)
        jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
        assert there.encode(TEXT).tolist() == here.encode(TEXT).tolist() == [256, *TEXT.encode()]
        assert (there.context, there.stop_ids) == (here.context, here.stop_ids) == (32, (256,))


def test_transformers_continues_a_run_as_it_does_itself(run, greedy, command, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = exported(command, run, tmp_path / "mine")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    asked = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    whole = model.generate(**asked, do_sample=False, max_new_tokens=16)[0].tolist()
    assert (whole[: len(greedy[0])], whole[len(greedy[0]) :]) == greedy


@pytest.mark.slow
def test_llama_cpp_continues_a_run_as_it_does_itself(run, greedy, command, tmp_path):
    file = exported(command, run, tmp_path / "mine.gguf")
    (found,) = llama_cpp([file], greedy[0], 16, TEXT)
    assert (found["text"], found["continuation"]) == greedy


def test_weights_are_written_in_the_type_that_is_asked_for(run, command, tmp_path):
    for dtype in ("bfloat16", "float16"):
        folder = exported(command, run, tmp_path / dtype, f"--dtype={dtype}")
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    files = [
        (run, "q8_0", "Q8_0"),
        (run, "float16", "F16"),
        (run, "bfloat16", "BF16"),
        (run, None, "F32"),
        (tmp_path / "bfloat16", None, "BF16"),
    ]
    for number, (model, dtype, kind) in enumerate(files):
        file = exported(command, model, tmp_path / f"{number}.gguf", *([f"--dtype={dtype}"] if dtype else []))
        types = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(file).tensors}
        assert (types["blk.0.attn_q.weight"], types["output_norm.weight"]) == (kind, "F32")


def test_a_directory_without_a_tokenizer_keeps_its_context(command, tmp_path):
    assert open_model(FIXTURES / "llama").context == 64
    shutil.copytree(FIXTURES / "llama", tmp_path / "long")
    facts = json.loads((FIXTURES / "llama" / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 99}))
    assert open_model(exported(command, tmp_path / "long", tmp_path / "out")).context == 99


LLAMA = FIXTURES / "llama"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model and --to are needed"),
        ([f"--model={LLAMA}", f"--to={LLAMA}"], "llama exists; give another name"),
        (
            [f"--model={LLAMA}", "--to=out", "--dtype=q8_0"],
            "--dtype=q8_0 is for .gguf files; out is written in",
        ),
        (
            [f"--model={LLAMA}", "--to=out", "--dtype=int8"],
            "should be one of <float32|bfloat16|float16|q8_0>",
        ),
        (["--model=nowhere", "--to=out"], "no model at 'nowhere': give a directory"),
        ([f"--model={LLAMA}", "--to=out.gguf"], "a GGUF file holds a tokenizer, and this model has none"),
        ([f"--model={LLAMA}", "--to=file/out"], "can't write file/out: "),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(
    arguments, words, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = command("llm_jax.export", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_other_tools_do_not_know_is_not_written(tmp_path):
    opened = open_model(LLAMA)
    odd = opened._replace(config=dataclasses.replace(opened.config, parametrization=MuP()))
    with pytest.raises(UserError, match="parametrization=mup"):
        export(odd, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_jax.interop.tensors.np.ascontiguousarray", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(open_model(LLAMA), tmp_path / "out")
    assert not list(tmp_path.iterdir())
