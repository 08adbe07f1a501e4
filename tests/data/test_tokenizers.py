import importlib.metadata
import lzma
import pathlib
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Bytes, Files, HuggingFace, SentencePiece, SentencePieceFile, Text, Tokenizer
from llm_jax.data.catalogue import texts

SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "tra", "shi", "o"]
AWKWARD = [
    "",
    " ",
    "  two spaces  ",
    "\n\n\r\n\t\tx\t \n",
    "nul \0 and \x7f and \x1b[0m",
    "e\u0301 é ﬁ ① \u200b\u3000\ufeff",
    "👩‍👩‍👧 🇫🇷 😀",
    "▁ sentencepiece's own ▁▁space▁",
    "<eot> <unk> <0x41> <|endoftext|> </s>",
    "\ud7ff\ue000\U0010ffff",
    "日本語と русский",
    "long " * 3000 + "\n" + "▁" * 5000,
]


def trained(corpus, **fields):
    return Text(Files((str(corpus),)), SentencePiece(**{"vocabulary": 330, **fields}), 16, 2).open()


@pytest.fixture
def files(corpus, tmp_path) -> dict[str, Tokenizer]:
    """One of each kind; those of files are trained here on the same texts."""
    lines = [path.read_text() for path in sorted(corpus.iterdir())]
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            minloglevel=2,
        )
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(lines, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    return {
        "bytes": Bytes(),
        "sentencepiece": SentencePiece(vocabulary=330),
        "unigram": SentencePiece("unigram", vocabulary=310),
        "huggingface": HuggingFace(str(tmp_path / "tokenizer.json"), eot="<|endoftext|>"),
        "sentencepiece_file": SentencePieceFile(str(tmp_path / "other.model")),
    }


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece_file"])
def test_a_file_is_parsed_once_and_again_when_it_has_changed(files, monkeypatch, kind):
    tokenizer, parsed, parse = files[kind], [], type(files[kind]).codec
    monkeypatch.setattr(type(tokenizer), "codec", lambda *args: parsed.append(1) or parse(*args))
    assert {tokenizer.size() for _ in range(5)} == {tokenizer.open().vocabulary}
    before = tokenizer.content()
    assert len(parsed) == 1
    path = pathlib.Path(tokenizer.path)
    other = SentencePiece(vocabulary=275).train(iter(["a few words"] * 30))
    path.write_bytes(other if path.suffix == ".model" else path.read_bytes() + b"\n")
    assert tokenizer.content() != before
    assert tokenizer.size() == tokenizer.open().vocabulary
    assert len(parsed) == 2


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", "huggingface"])
def test_any_text_comes_back_exactly(files, corpus, kind):
    codec = Text(Files((str(corpus),)), files[kind], 16, 2).open().codec
    for text, ids in zip(AWKWARD, codec.encode_batch(AWKWARD), strict=True):
        assert codec.decode(ids) == text
        np.testing.assert_array_equal(codec.encode(text), ids)
        assert codec.eot not in ids and (len(ids) == 0 or 0 <= min(ids) <= max(ids) < codec.vocabulary)
    assert codec.decode([codec.eot, *codec.encode("a b"), codec.eot]) == "a b"
    assert codec.vocabulary == files[kind].size() > codec.eot


def test_a_loaded_model_encodes_as_the_library_does(files, corpus):
    codec = files["sentencepiece_file"].open()
    reference = sentencepiece.SentencePieceProcessor(model_file=files["sentencepiece_file"].path)
    text = "▁ ".join(path.read_text() for path in sorted(corpus.iterdir()))
    assert list(codec.encode(text)) == reference.encode(text)
    assert codec.eot == reference.eos_id()
    assert codec.decode(codec.encode("the quick fox")) == "the quick fox"


def test_training_is_deterministic_and_fits_the_vocabulary(corpus, cache, monkeypatch, tmp_path):
    for algorithm, size in (("bpe", 330), ("unigram", 310)):
        first = trained(corpus, algorithm=algorithm, vocabulary=size).codec
        monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / algorithm))
        again = trained(corpus, algorithm=algorithm, vocabulary=size).codec
        assert first.fingerprint == again.fingerprint
        assert first.vocabulary == size
        assert len(first.encode("the quick brown fox")) < 19


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_renamed_files_train_the_same_tokenizer(tmp_path, monkeypatch, algorithm):
    """Unigram's vocabulary depends on the order of the texts, which are some of the training documents."""
    found = []
    for name, order in (("one", range(60)), ("other", reversed(range(60)))):
        (folder := tmp_path / name).mkdir()
        for place, number in enumerate(order):
            draw = random.Random(number)
            words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(60)]
            (folder / f"{place:02}.txt").write_text(" ".join(words))
        monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / f"cache-{name}"))
        source = trained(folder, algorithm=algorithm, vocabulary=480, sample_bytes=12_000)
        found.append(source.codec.fingerprint)
    assert found[0] == found[1]


def test_another_version_of_the_library_trains_anew_and_is_recorded(corpus, cache, monkeypatch):
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert trained(corpus).record["tokenizer"]["library"] == f"sentencepiece {version}"
    assert len(list(cache.glob("tokenizers/*.model"))) == 2


def test_the_held_out_documents_are_not_trained_on(tmp_path):
    (folder := tmp_path / "texts").mkdir()
    for number in range(40):
        mark = chr(ord("一") + number) * 200
        (folder / f"{number}.txt").write_text(f"{mark} some words that all the files share {number}\n" * 5)
    text = Text(Files((str(folder),)), SentencePiece(vocabulary=340, character_coverage=1.0), 16, 2)
    source = text.open()
    held = source.codec.decode(source.held_out().rows(np.arange(1000))["tokens"].ravel())
    marks = {c for c in held if c >= "一"}
    assert marks and all(len(source.codec.encode(c)) == 3 for c in marks)  # spelled in bytes
    everything = {c for _, t in texts(text.corpus, 1 << 20) for c in t if c >= "一"}
    assert all(len(source.codec.encode(c)) == 1 for c in everything - marks)


def test_whitespace_of_programs_has_tokens_of_its_own(tmp_path):
    code = "def f(x):\n    if x:\n        return x\n    return None\n\n\n"
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(code.replace("x", "xyz"[number % 3]) * (number + 1))
    codec = trained(tmp_path, vocabulary=310).codec
    assert len(codec.encode("        return")) < len("        return") / 2
    assert codec.decode(codec.encode(code)) == code


def test_gpt2_ids_are_those_of_its_authors(reference_data, tmp_path):
    names = {"encoder.json": "gpt2-encoder.json.xz", "vocab.bpe": "gpt2-vocab.bpe.xz"}
    for name, packed in names.items():
        (tmp_path / name).write_bytes(lzma.decompress((reference_data / "tokenizers" / packed).read_bytes()))
    made = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe"))
    made.save(str(tmp_path / "gpt2.json"))
    codec = HuggingFace(str(tmp_path / "gpt2.json"), eot="<|endoftext|>").open()
    assert (codec.vocabulary, codec.eot) == (50257, 50256)
    assert list(codec.encode("Hello world")) == [15496, 995]
    for text in AWKWARD:
        assert codec.decode(codec.encode(text)) == text
    assert codec.eot not in codec.encode("<|endoftext|>")


def test_files_are_chosen_by_name_and_enter_identity_by_content(files, corpus, tmp_path):
    assert config.override(Text(), "tokenizer", "x.model").tokenizer == SentencePieceFile("x.model")
    assert config.override(Text(), "tokenizer", "y/tokenizer.json").tokenizer == HuggingFace(
        "y/tokenizer.json"
    )
    base = Text(Files((str(corpus),)))
    copied = tmp_path / "copied.json"
    data = pathlib.Path(files["huggingface"].path).read_text()
    copied.write_text(data)
    one = config.override(base, "tokenizer", files["huggingface"].path)
    two = config.override(base, "tokenizer", str(copied))
    assert config.identity(one, 1) == config.identity(two, 1)
    copied.write_text(data + "\n")
    assert config.identity(one, 1) != config.identity(two, 1)


# ---- what a user can get wrong ----


def test_a_vocabulary_larger_than_the_corpus_supports_is_refused_with_the_largest_possible(corpus, cache):
    with pytest.raises(
        UserError, match=r"vocabulary=50000 is larger than the corpus supports: at most \d+"
    ) as caught:
        trained(corpus, vocabulary=50_000)
    assert not list(cache.glob("tokenizers/*.model*[!k]")) and not (cache / "tokens").exists()
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert trained(corpus, vocabulary=largest).codec.vocabulary == largest


def test_a_vocabulary_too_small_for_the_characters_is_refused(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("".join(chr(0x4E00 + i) for i in range(500 + number)))
    with pytest.raises(UserError, match=r"vocabulary=400 is too small.*raise it or lower"):
        trained(tmp_path, vocabulary=400)
    with pytest.raises(UserError, match="260"):
        config.check(SentencePiece(vocabulary=100))


def test_files_that_are_no_tokenizers_are_named(files, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer file .*other.modell.*did you mean .*other.model"):
        SentencePieceFile(str(tmp_path / "other.modell")).size()
    (tmp_path / "bad.model").write_bytes(b"nothing")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.model"):
        SentencePieceFile(str(tmp_path / "bad.model")).size()
    with pytest.raises(UserError, match=r"bad\.json"):
        HuggingFace(str(tmp_path / "bad.json")).size()
    with pytest.raises(UserError, match=r"no token '<\|endoftxt\|>'; did you mean '<\|endoftext\|>'"):
        HuggingFace(files["huggingface"].path, eot="<|endoftxt|>").size()
    with pytest.raises(UserError, match="did you mean 'sentencepiece'"):
        Tokenizer.parse("sentencpiece")
