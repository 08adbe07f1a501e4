"""Every family's logits are those of transformers, and what is saved is what was loaded."""

import dataclasses
import functools
import json
import re
import shutil
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
import tokenizers
from reference import FIXTURES, MODELS, characters
from tiny import parameters

from llm_jax.config import UserError
from llm_jax.interop import families, huggingface, tokenizer
from llm_jax.models import Layout
from llm_jax.models.experts import Experts
from llm_jax.models.parametrization import MuP
from llm_jax.models.positions import Sinusoidal
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import MeshConfig, make_mesh

each_family = pytest.mark.parametrize("name", MODELS)
TOLERANCE = 2e-4


def logits(config, params, tokens):
    model = config.build(Layout(unroll=False, attention="reference"))  # the least to compile
    run = jax.jit(lambda p, t: model.unembed(p, model.apply(p, {"tokens": t}, None).hidden))
    return np.asarray(run(params, jnp.asarray(tokens)))


@functools.cache
def loaded(name):
    return huggingface.load(FIXTURES / name)


def same_tree(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@each_family
def test_logits_are_those_that_transformers_computed(name):
    config, params, _ = loaded(name)
    expected = np.load(FIXTURES / name / "expected.npz")
    np.testing.assert_allclose(
        logits(config, params, expected["tokens"]), expected["logits"], rtol=0, atol=TOLERANCE
    )


@each_family
def test_what_is_saved_has_the_tensors_and_the_config_of_what_was_loaded(name, tmp_path):
    config, params, _ = loaded(name)
    kind = json.loads((FIXTURES / name / "config.json").read_text())["model_type"]
    huggingface.save(tmp_path / "out", config, params, family=kind)
    before = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    same_tree(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), before)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert families.of(facts).read(facts) == config


@each_family
def test_transformers_computes_the_same_from_what_is_saved_here(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params, _ = loaded(name)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    letters = characters(config.vocabulary, chat_template=template, context=80)
    huggingface.save(tmp_path / "out", config, params, letters)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, **reference.EAGER
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = np.load(FIXTURES / name / "expected.npz")
    got = reference.logits(theirs.eval(), expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)
    cutting = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert cutting("!!# $").input_ids == letters.encode("!!# $").tolist() == [33, 33, 35, 32, 36]
    assert cutting.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert huggingface.load(tmp_path / "out").tokenizer == letters


def test_fixtures_say_by_what_they_were_computed():
    assert {"torch", "transformers"} == json.loads((FIXTURES / "versions.json").read_text()).keys()


def changed(tmp_path, name="llama", tensors=None, **keys):
    """A copy of a fixture with other keys (None: without) in its config, or other tensors."""
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / name, folder)
    facts = json.loads((folder / "config.json").read_text()) | keys
    facts = {key: value for key, value in facts.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(facts))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def tensors_of(name="llama"):
    return safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")


def dtypes(params):
    return {leaf.dtype.name for leaf in jax.tree.leaves(params)}


def test_bfloat16_stays_and_float16_becomes_float32(tmp_path):
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors_of().items()}
    config, params, _ = huggingface.load(changed(tmp_path, tensors=tensors))
    assert config.dtype == "bfloat16" and dtypes(params) == {"bfloat16"}
    huggingface.save(tmp_path / "out", config, params)
    same_tree(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = {name: tensor.astype(np.float16) for name, tensor in tensors_of().items()}
    shutil.rmtree(tmp_path / "model")
    config, params, _ = huggingface.load(changed(tmp_path, tensors=half))
    assert config.dtype == "float32" and dtypes(params) == {"float32"}


def test_each_tensor_keeps_its_type_and_most_numbers_say_what_is_computed_in(tmp_path):
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors_of().items()}
    tensors["model.norm.weight"] = tensors_of()["model.norm.weight"]
    config, params, _ = huggingface.load(changed(tmp_path, tensors=tensors))
    assert config.dtype == "bfloat16" and params["norm"]["scale"].dtype == jnp.float32
    assert dtypes(params["body"]) == dtypes(params["embed"]) == {"bfloat16"}
    assert np.isfinite(logits(config, params, np.arange(8)[None])).all()
    huggingface.save(tmp_path / "out", config, params)
    same_tree(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_model_safetensors_is_read_alone(tmp_path):
    folder = changed(tmp_path)
    for name in ("consolidated", "model_ema"):
        other = {"norm.weight": np.zeros(2, np.float32), "model.norm.weight": np.zeros(24, np.float32)}
        safetensors.numpy.save_file(other, folder / f"{name}.safetensors")
    same_tree(huggingface.load(folder).params, loaded("llama").params)


def test_a_thousand_experts_are_read_in_the_time_that_writing_them_takes(tmp_path):
    experts = Experts(count=512, active=2)
    config = Transformer(layers=2, width=4, heads=2, vocabulary=5, mlp_width=2, experts=experts)
    params = parameters(config.build())
    times = [time.process_time()]
    huggingface.save(tmp_path / "out", config, params)
    times.append(time.process_time())
    found = huggingface.load(tmp_path / "out").params
    writing, reading = np.diff([*times, time.process_time()])
    assert reading < 2 * writing  # it is 0.6 of it, and with a program of a thousand inputs 3.3
    same_tree(found, params)


def test_a_head_of_its_own_is_used_whatever_the_config_says_and_a_copy_is_not(tmp_path):
    folder = changed(tmp_path, tie_word_embeddings=True)
    same_tree(huggingface.load(folder).params, loaded("llama").params)
    shutil.rmtree(folder)
    tensors = tensors_of() | {"lm_head.weight": tensors_of()["model.embed_tokens.weight"]}
    config, params, _ = huggingface.load(changed(tmp_path, tensors=tensors, tie_word_embeddings=True))
    assert config.tied and "head" not in params


def test_a_tokenizer_saved_while_it_cut_and_padded_does_neither(tmp_path):
    made = tokenizers.Tokenizer.from_str(tokenizer.of_bytes().data)
    made.enable_truncation(4)
    made.enable_padding(length=9, pad_id=256, pad_token=tokenizer.EOS)
    folder = changed(tmp_path)
    (folder / "tokenizer.json").write_text(made.to_str())
    found = huggingface.load(folder).tokenizer
    assert found.decode(found.encode("hello")) == "hello" and len(found.encode("hello")) == 5
    assert found.data == tokenizer.of_bytes().data


@pytest.mark.parametrize("name", ["gelu", "relu", "relu2"])
def test_gpt2_computes_with_the_activation_that_its_config_names(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = changed(tmp_path, "gpt2", activation_function=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **reference.EAGER)
    config, params, _ = huggingface.load(folder)
    expected = reference.logits(theirs.eval(), reference.tokens())
    got = logits(config, params, reference.tokens())
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    assert families.FAMILIES["gpt2"].write(config)["activation_function"] == name


def test_shards_and_a_mesh_of_eight_devices_change_nothing(tmp_path):
    config, params, _ = loaded("olmoe")
    huggingface.save(tmp_path / "out", config, params, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = huggingface.load(tmp_path / "out", mesh)
    same_tree(spread.params, params)
    assert not spread.params["body"]["0"]["mixer"]["query"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        expected = np.load(FIXTURES / "olmoe" / "expected.npz")
        got = logits(config, spread.params, expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)


def test_the_host_holds_a_tensor_at_a_time_and_a_device_its_part(tmp_path, monkeypatch):
    config = Transformer(layers=8, width=256, heads=4, vocabulary=64, mlp_width=4096)
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(config.build().init, jax.random.key(0))
    )
    huggingface.save(tmp_path / "out", config, params)
    largest, whole = 256 * 4096 * 4, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    sent, send = [], jax.make_array_from_callback

    def watched(*args):
        sent.append(send(*args))
        return sent[-1]

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    tracemalloc.start()
    found = huggingface.load(tmp_path / "out", make_mesh(MeshConfig(data=1, fsdp=8))).params
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest + 1_500_000 < whole / 10  # as it is read, and as it is sent
    for array in [*sent, *jax.tree.leaves(found)]:
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}


def test_names_without_the_model_s_prefix_and_buffers_of_older_files_are_read(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of("gpt2").items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32), "lm_head.weight": tensors["wte.weight"]}
    found = huggingface.load(changed(tmp_path, "gpt2", tensors=tensors))
    same_tree(found.params, loaded("gpt2").params)


def test_a_model_of_this_house_is_saved_as_what_it_is(tmp_path):
    rows = {
        "llama": Transformer(vocabulary=40),
        "qwen3": Transformer(vocabulary=40, qk_norm=True),
        "mistral": Transformer(vocabulary=40, windows=(16,)),
        "smollm3": Transformer(vocabulary=40, rotations=(Transformer().positions, None)),
    }
    for name, config in rows.items():
        assert families.fitting(config)[0].name == name
    for config, says in [
        (Transformer(vocabulary=40, norm_position="post"), "norm_position=post"),
        (Transformer(vocabulary=40, positions=Sinusoidal()), "differs in model.positions"),
        (Transformer(vocabulary=40, parametrization=MuP()), "parametrization=mup"),
    ]:
        with pytest.raises(UserError, match=says):
            huggingface.save(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path):
    def fails(says, folder):
        with pytest.raises(UserError, match=says) as error:
            huggingface.load(folder)
        assert "\n" not in str(error.value)
        shutil.rmtree(folder, ignore_errors=True)

    fails("no config.json there", tmp_path / "nothing")
    fails(
        "no architecture 'BertModel' here; there are: LlamaForCausalLM",
        changed(tmp_path, architectures=["BertModel"]),
    )
    images = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    fails("'Gemma3ForConditionalGeneration' here for text and images, only", changed(tmp_path, **images))
    fails("activation_function='mish' of", changed(tmp_path, "gpt2", activation_function="mish"))
    fails("has no 'num_hidden_layers'", changed(tmp_path, num_hidden_layers=None))
    fails("has no 'vocab_size'", changed(tmp_path, vocab_size=None))
    fails("hidden_act='relu' of config.json is not known here; silu", changed(tmp_path, hidden_act="relu"))
    fails("rope_type='longrope'", changed(tmp_path, rope_parameters={"rope_type": "longrope"}))
    fails("partial_rotary_factor", changed(tmp_path, partial_rotary_factor=0.5))
    fails("clip_qkv=3 is not known here", changed(tmp_path, "olmoe", clip_qkv=3))
    fails("is not an integer", changed(tmp_path, num_hidden_layers="two"))
    fails(
        r"mlp.down_proj.weight is \(24, 20\), and by the config it is \(24, 21\)",
        changed(tmp_path, intermediate_size=21),
    )
    tensors = tensors_of()
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    fails("1 tensors missing: model.norm.weight", changed(tmp_path, tensors=missing))
    stray = tensors | {"vision.weight": np.ones(2, np.float32)}
    fails("1 tensors without a use: vision.weight", changed(tmp_path, tensors=stray))
    whole = tensors | {"model.norm.weight": np.ones(24, np.int32)}
    fails("model.norm.weight is I32; BF16, F32", changed(tmp_path, tensors=whole))
    folder = changed(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails("model.safetensors: not a whole safetensors file", folder)
    folder = changed(tmp_path)
    (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(100))
    fails("not a whole safetensors file", folder)
    for name in ("model-2.safetensors", "../model.safetensors"):
        folder = changed(tmp_path)
        (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        fails(f"names {re.escape(name)}, not in", folder)
    folder = changed(tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "first.safetensors")
    (folder / "model.safetensors").rename(folder / "second.safetensors")
    fails("lm_head.weight is in first.safetensors and in second.safetensors", folder)
    folder = changed(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails("pytorch_model.bin is pickled, and a pickle runs whatever code it holds", folder)
    folder = changed(tmp_path)
    (folder / "config.json").write_text("{")
    fails("config.json: not JSON", folder)
    folder = changed(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    fails("not a tokenizer.json", folder)
    for name, says in (("tokenizer.json", "not UTF-8 at byte 0"), ("tokenizer.model", "not a SentencePiece")):
        folder = changed(tmp_path)
        (folder / name).write_bytes(b"\xff\xfe")
        fails(f"{name}: {says}", folder)
    fails("max_position_embeddings is 'x', and it is", changed(tmp_path, max_position_embeddings="x"))
    fails(
        "layer_types of config.json: 4 of full_attention",
        changed(tmp_path, "gemma3", layer_types=["foo"] * 7),
    )
    with pytest.raises(UserError, match="not UTF-8: byte 0xe9 behind 3 characters"):
        tokenizer.of_bytes().encode("caf\udce9")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} exists")):
        huggingface.save(tmp_path, *loaded("llama")[:2])


def test_a_trained_tokenizer_and_chat_template_open_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from llm_jax.data.tokenizers import Bytes

    config, params, _ = loaded("smollm2")
    config = dataclasses.replace(config, vocabulary=257)
    params = config.build().init(jax.random.key(0))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    portable = dataclasses.replace(tokenizer.of(Bytes()), chat_template=template, context=99)
    huggingface.save(tmp_path / "out", config, params, portable)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve\r\n  ☕ <|endoftext|>"
    ours = huggingface.load(tmp_path / "out").tokenizer
    assert theirs(text).input_ids == ours.encode(text).tolist() == [*text[:-13].encode(), 256]
    assert ours.decode(ours.encode(text)) == text[:-13] and theirs.model_max_length == ours.context == 99
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert ours.stops == (256,) and theirs.eos_token_id == 256 and ours.chat_template == template
    assert ours.codec().encode(text).tolist() == list(text.encode())
