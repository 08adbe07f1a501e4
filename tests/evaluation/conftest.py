"""A tiny random model whose tokenizer merges, so that boundaries between texts matter."""

import pathlib
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "interop")]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the rain in spain falls mainly in the plain and there the grain remains again " * 3


def portable(context=64):
    from llm_jax.interop.tokenizer import Portable

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    roles = {"bos_token": "<s>", "eos_token": "<|end|>"}
    return Portable(tokenizer.to_str(), roles, (1,), TEMPLATE, context)


@pytest.fixture(scope="session")
def opened():
    """One layer, 320 tokens, a context of 64, a chat template."""
    from tiny import parameters

    from llm_jax.inference.opening import Opened
    from llm_jax.models.transformer import Transformer

    tokenizer = portable()
    config = Transformer(layers=1, width=32, heads=4, vocabulary=tokenizer.vocabulary)
    return Opened("tiny", config, parameters(config.build(), seed=3), tokenizer, tokenizer.context)


@pytest.fixture(scope="session")
def evaluator(opened):
    """One that keeps nothing on disk."""
    from llm_jax.evaluation.runner import Evaluator

    return Evaluator(opened, slots=4)


@pytest.fixture(scope="session")
def saved(opened, tmp_path_factory):
    """The model as a directory in Hugging Face's format."""
    from llm_jax.interop import huggingface

    place = tmp_path_factory.mktemp("model") / "tiny"
    huggingface.save(place, opened.config, opened.params, opened.tokenizer)
    return place
