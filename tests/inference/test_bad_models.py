"""What a user can get wrong about a model, a prompt or its sampling: exit code 2 and one line."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from reference import FIXTURES, characters

from llm_jax.interop import gguf, huggingface


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that is right, and copies of it that are wrong in one way each."""
    here = tmp_path_factory.mktemp("models")
    config, params, _ = huggingface.load(FIXTURES / "llama")
    huggingface.save(here / "good", config, params, characters(37, context=64))
    gguf.save(here / "good.gguf", config, params, characters(37))
    weights, said = here / "good" / "model.safetensors", here / "good" / "config.json"
    tensors, facts = safetensors.numpy.load_file(weights), json.loads(said.read_text())

    def wrong(name, file, content):
        shutil.copytree(here / "good", here / name)
        if isinstance(content, bytes):
            (here / name / file).write_bytes(content)
        else:
            (here / name / file).write_text(json.dumps(content))

    wrong("truncated", weights.name, weights.read_bytes()[:-9])
    wrong("foreign", weights.name, b"PK\x03\x04" + bytes(99))
    wrong("sharded", "model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}})
    wrong("indexed", "model.safetensors.index.json", {"metadata": {}})
    for name in ("sharded", "indexed"):
        (here / name / weights.name).unlink()
    wrong("shapes", said.name, facts | {"intermediate_size": 21})
    wrong("unknown", said.name, facts | {"architectures": ["MambaForCausalLM"]})
    wrong("listed", said.name, [facts])
    wrong("damaged", said.name, facts | {"rope_parameters": "llama3"})
    wrong("stray", weights.name, safetensors.numpy.save(tensors | {"vision.weight": np.ones(2)}))
    wrong("longer", "tokenizer.json", json.loads(characters(41).data))
    wrong("spelled", "tokenizer.json", {"model": "letters"})
    shutil.copytree(here / "good", here / "pickled")
    (here / "pickled" / weights.name).rename(here / "pickled" / "pytorch_model.bin")
    whole = (here / "good.gguf").read_bytes()
    for name, content in {"short": whole[:-999], "cut": whole[:99], "zip": b"PK\x03\x04" + whole}.items():
        (here / f"{name}.gguf").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        yield here


def refusal(code, out, err):
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err
    return err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("truncated", "truncated/model.safetensors: not a whole safetensors file"),
        ("foreign", "foreign/model.safetensors: not a whole safetensors file"),
        ("sharded", "names model-2.safetensors, not in sharded"),
        ("indexed", "model.safetensors.index.json: not an index of shards"),
        ("shapes", "mlp.down_proj.weight is (24, 20), and by the config it is (24, 21)"),
        ("unknown", "no architecture 'MambaForCausalLM' here; there are: LlamaForCausalLM, Mistral"),
        ("listed", "listed/config.json: a list, and it should be an object"),
        ("damaged", "config.json of a llama is damaged: "),
        ("stray", "1 tensors without a use: vision.weight"),
        ("spelled", "tokenizer.json: not a tokenizer.json: "),
        ("longer", "longer: the tokenizer has 4 tokens beyond the model's vocabulary of 37: put the one"),
        ("pickled", "pytorch_model.bin is pickled, and a pickle runs whatever code it holds"),
        ("pickled/pytorch_model.bin", "pickled/pytorch_model.bin is pickled, and a pickle runs whatever"),
        ("short.gguf", "short.gguf: not a whole GGUF file"),
        ("cut.gguf", "cut.gguf: not a whole GGUF file"),
        ("zip.gguf", "zip.gguf is not a GGUF file"),
        ("none.gguf", "no model at 'none.gguf'"),
    ],
)
def test_what_is_no_sound_model_is_one_line(place, command, model, words):
    assert words in refusal(*command("llm_jax.generate", f"--model={model}", "--prompt=!!"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("score", ["--text=!!"]), ("chat", []), ("export", ["--to=out"]), ("generate", ["--prompt=!!"])],
)
def test_every_command_says_so_in_one_line(place, command, name, arguments):
    line = refusal(*command(f"llm_jax.{name}", "--model=truncated", *arguments))
    assert "not a whole safetensors file" in line and not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=" + "!" * 64], "the prompt has 64 tokens, and the model's context is 64: shorten it"),
        (["--temperature=-1"], "temperature is -1.0; it is a number of at least 0"),
        (["--temperature=warm"], "--temperature=warm is not a number"),
        (["--temperature=nan"], "temperature is nan; it is a number of at least 0"),
        (["--top_k=-1"], "top_k is -1; it is at least 0"),
        (["--top_p=0"], "top_p is 0.0; it is above 0 and at most 1"),
        (["--min_p=2"], "min_p is 2.0; it is between 0 and 1"),
        (["--repetition_penalty=0"], "repetition_penalty is 0.0; it is a positive number"),
        (["--seed=-1"], "seed is -1; it is 0 .. 4294967295"),
        (["--logit_bias=hot"], "--logit_bias: 'hot' is not ID:BIAS, such as 42:-100"),
        (["--logit_bias=37:1"], "logit_bias 37:1.0: ids lie in 0 .. 36"),
        (["--max_tokens=0"], "max_tokens is 0; it is at least 1"),
        (["--stop="], "a stop text is empty"),
        (["--n=0"], "n is 0; it is at least 1"),
        (["--slots=0"], "slots is 0; it is at least 1"),
        (["--candidates=-1"], "candidates is -1; it is at least 0"),
        (["--topp=1"], "no flag --topp; did you mean '--top_p'?"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(place, command, arguments, words):
    assert words in refusal(*command("llm_jax.generate", "--model=good", "--prompt=!!", *arguments))


def test_a_text_that_is_too_long_or_of_other_ids_is_not_scored(place, command):
    line = refusal(*command("llm_jax.score", "--model=good", "--text=" + "!" * 65, "--out=scores.npz"))
    assert "the text has 65 tokens, and the model's context is 64: shorten it" in line
    np.save(place / "ids.npy", np.array([3, 37]))
    line = refusal(*command("llm_jax.score", "--model=good.gguf", "--ids=ids.npy", "--out=scores.npz"))
    assert "ids lie in 0 .. 36, and these in 3 .. 37" in line
    assert not list(place.glob("scores*"))
