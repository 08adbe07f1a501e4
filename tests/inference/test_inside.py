"""What is seen inside a model is what transformers sees there, and ends in what the model says."""

import functools

import jax
import numpy as np
import pytest
import reference
from reference import FIXTURES

from llm_jax.config import UserError
from llm_jax.inference.inside import lens, look, neighbours
from llm_jax.inference.opening import open_model
from llm_jax.inference.quantising import quantise

NAMES = "gpt2", "llama", "gemma3"  # learned and rotary positions; shared keys; windows, sandwiched norms
TOLERANCE = 2e-4
each_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def opened(name):
    return open_model(FIXTURES / name)


@functools.cache
def seen(name):
    return look(opened(name), reference.tokens()[0])


@each_model
def test_the_lens_after_the_last_layer_says_what_the_model_says(name):
    expected = np.load(FIXTURES / name / "expected.npz")["logits"][0]
    np.testing.assert_allclose(lens(opened(name), seen(name).stream[-1]), expected, rtol=0, atol=TOLERANCE)
    early = lens(opened(name), seen(name).stream)
    assert early.shape == (len(seen(name).stream), *expected.shape)
    assert np.abs(early[1] - expected).max() > 0.1


@each_model
def test_attention_is_shared_out_among_a_token_and_those_before_it(name):
    attention, config = seen(name).attention, opened(name).config
    assert attention.shape == (config.layers, config.heads, 20, 20)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
    age = np.arange(20)[:, None] - np.arange(20)
    for layer in range(config.layers):
        unseen = (age < 0) | (age >= (config.window(layer) or 20))
        assert (attention[layer][:, unseen] == 0).all() and (attention[layer][:, ~unseen] > 0).all()


@each_model
def test_attention_and_streams_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, **reference.EAGER).eval()
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(reference.tokens()[:1]), output_attentions=True, output_hidden_states=True
        )
    attention = np.concatenate([layer.numpy() for layer in theirs.attentions])
    np.testing.assert_allclose(seen(name).attention, attention, rtol=0, atol=TOLERANCE)
    states = np.concatenate([state.numpy() for state in theirs.hidden_states[:-1]])  # the last one is normed
    np.testing.assert_allclose(seen(name).stream[:-1], states, rtol=0, atol=TOLERANCE)


def test_neighbours_are_the_embeddings_of_the_smallest_angle():
    table = np.asarray(opened("llama").params["embed"]["embedding"], np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    cosines = table @ table[5]
    found = neighbours(opened("llama"), 5, count=4)
    assert [token for token, _ in found] == np.argsort(-cosines)[1:5].tolist()
    np.testing.assert_allclose([cosine for _, cosine in found], np.sort(cosines)[-2:-6:-1], atol=1e-5)


def test_a_text_that_is_too_long_to_be_read_is_refused():
    with pytest.raises(UserError, match="81 tokens, and the model's context is 80"):
        look(opened("gpt2"), np.zeros(81, int))


def test_neighbours_of_weights_of_eight_bits_are_nearly_those_of_the_others_and_at_most_all():
    wide = opened("llama")
    small = wide._replace(params=jax.jit(quantise)(wide.params))
    every = neighbours(wide, 5, count=10_000)
    assert len(every) == wide.config.vocabulary - 1 and 5 not in dict(every)
    assert neighbours(small, 5, count=1)[0][0] == every[0][0]
    np.testing.assert_allclose(
        [c for _, c in neighbours(small, 5, 99)], [c for _, c in every[:99]], atol=0.02
    )
