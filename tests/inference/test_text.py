"""Text is given when no later token can change it, and is that of all tokens at once."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as library

from llm_jax.data.templates import CLOSE, OPEN
from llm_jax.inference.text import TextStream
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.tokenizer import Portable


def test_text_is_given_when_it_is_certain_and_ends_before_a_stop():
    letters = tokenizers.of_bytes()
    text = "naïve → STOP it"
    stream = TextStream(letters, ["STOP", "never"])
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] and "S" not in pieces[-1]
        if stream.stopped:
            break
    assert "".join(pieces) + stream.rest() == "naïve → "
    stream = TextStream(letters, ["STOP"])
    assert "".join(map(stream.push, b"a STO")) == "a " and stream.rest() == "STO"
    assert TextStream(letters).push(0xC3) == ""


def pieces(prefix):
    """SentencePiece's spelling, with bytes for what it doesn't know; with a prefix as Llama 2 and Mistral."""
    words = [
        "\u2581",
        "P",
        "a",
        "r",
        "i",
        "s",
        "\u2581P",
        "\u2581Pa",
        "ri",
        "\u2581Pari",
        "\u2581Paris",
        "\u2581is",
    ]
    table = [("<unk>", 0.0), ("<s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256))]
    table += [(word, -float(number)) for number, word in enumerate(words, 1)]
    tokenizer = tokenizers.spell(table, 0, bpe=True, prefix=prefix)
    tokenizer.add_tokens([library.AddedToken("<s>", special=True, normalized=False)])
    return Portable(tokenizer.to_str(), {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "tokenizer", [pieces(True), pieces(False), tokenizers.of_bytes()], ids=["prefix", "no prefix", "bytes"]
)
def test_a_prompt_and_what_is_streamed_after_it_are_the_text_of_all_its_tokens(tokenizer):
    random = np.random.default_rng(0)
    words = ["Paris", " is", "é", "思日", " ", "<s>", "<|endoftext|>", "🙂🙃", "  a"]
    for _ in range(100):
        ids = tokenizer.encode("".join(random.choice(words, 8)), special=False)
        cut = random.integers(0, len(ids))
        while "\ufffd" in tokenizer.decode(ids[:cut]):
            cut -= 1  # not inside a character
        stream = TextStream(tokenizer, before=ids[:cut])
        given = "".join(map(stream.push, ids[cut:].tolist())) + stream.rest()
        assert tokenizer.decode(ids[:cut]) + given == tokenizer.decode(ids)


def test_a_stop_text_ends_what_was_held_back_too():
    letters = json.loads(tokenizers.of_bytes().data)
    letters["model"]["vocab"]["STOP\u00c3"] = 300  # with a part of a character
    stream = TextStream(dataclasses.replace(tokenizers.of_bytes(), data=json.dumps(letters)), ["STOP"])
    assert stream.push(97) == "a" and stream.push(300) == "" and not stream.stopped
    assert stream.rest() == "" and stream.stopped


@pytest.mark.parametrize("tokenizer", [pieces(False), tokenizers.of_bytes()], ids=["pieces", "bytes"])
def test_a_call_is_text_where_its_ends_are_special_tokens_too(tokenizer):
    special = library.Tokenizer.from_str(tokenizer.data)
    names = [library.AddedToken(name, special=True, normalized=False) for name in (OPEN, CLOSE, "<|end|>")]
    special.add_special_tokens(names)
    found = dataclasses.replace(tokenizer, data=special.to_str())
    ids = found.encode("P<T_C>a</T_C><|end|> is", special=False)
    assert found.vocabulary_of()[OPEN] in ids and found.decode(ids) == "P<T_C>a</T_C> is"
    stream = TextStream(found, [CLOSE])
    assert "".join(map(stream.push, ids.tolist())) == "P<T_C>a" and stream.stopped == CLOSE
    assert found.codec().encode(OPEN).tolist() == found.encode(OPEN, special=False).tolist()[-1:]
