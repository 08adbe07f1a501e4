"""Tokenizers: text to token ids and back without loss.

A config opens a `Codec`. `eot` (end of text) stands before each document and after the last; no text encodes
to it.
"""

import dataclasses
import functools
import importlib.metadata
import io
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from llm_jax.config import Tagged, UserError, outside_identity
from llm_jax.data import readers
from llm_jax.data.cache import cache_folder, digest, once
from llm_jax.data.templates import Template, named
from llm_jax.files import in_bucket

_FILES = {".model": "sentencepiece_file", ".json": "huggingface"}  # suffix -> kind
_CHUNK_CHARACTERS = 4096  # BPE is slow on long texts, and chunks keep all threads busy


class Codec(Protocol):
    """A tokenizer at work."""

    vocabulary: int
    eot: int
    fingerprint: str  # of the tokenizer itself
    library: str | None  # what encodes, with its version: another may encode some text otherwise
    holes: bool  # ids are missing where others would give one to a new token

    def encode(self, text: str) -> np.ndarray:
        """The token ids [tokens] of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, computed by as many threads as there are cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, any eot left out."""

    def id_of(self, name: str) -> int | None:
        """The id of the special token of that name, if it has one."""

    def named(self, template: str) -> Template:
        """A chat template of somebody's own, with the special tokens that it writes."""


Sample = Callable[[int], Iterator[str]]  # about so many bytes of the training documents


class Tokenizer(Tagged):
    """Root of the tokenizers. A `.model` or `.json` file on the command line stands for itself, and the place
    of a model for its tokenizer.
    """

    @classmethod
    def parse(cls, text: str) -> "Tokenizer":
        suffix = pathlib.Path(text).suffix
        is_model = in_bucket(text) or suffix == ".gguf" or os.path.isdir(os.path.expanduser(text))
        if "pretrained" in cls.members and is_model:
            return cls.members["pretrained"](path=text)
        return cls.members[_FILES[suffix]](path=text) if suffix in _FILES else super().parse(text)

    @classmethod
    def choices(cls) -> list[str]:
        return [*cls.members, "a .model or .json file", "a model's place"]

    def size(self) -> int:
        """The number of token ids."""
        raise NotImplementedError

    def open(self, sample: Sample, content: str) -> Codec:
        """The codec, trained on `sample` of the data `content` (its hash) if it is one that is trained."""
        raise NotImplementedError

    def content(self) -> str | None:
        """The hash of the file behind it, if there is one: a part of a run's identity."""
        return None

    def id_of(self, name: str) -> int | None:
        """The id of the special token of that name, if the tokenizer has it already."""
        return None

    def named(self, template: str) -> Template:
        """A chat template of somebody's own, with the special tokens that it writes."""
        return named(template)

    def keep(self, data: Any, source: Any, folder: pathlib.Path) -> None:
        """Leaves in the folder of a run on `data` what opening it needs and may be gone by then: nothing."""

    def template(self) -> Template | None:
        """The chat template that came with it, if one did."""
        return None


@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer, kind="bytes"):
    """Each byte of the UTF-8 text is a token, and 256 is eot. Its own codec."""

    vocabulary = 257
    eot = 256
    fingerprint = "bytes"
    library = None
    holes = False

    def size(self) -> int:
        return self.vocabulary

    def open(self, sample: Sample, content: str) -> "Bytes":
        return self

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i != self.eot).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class SentencePiece(Tokenizer, kind="sentencepiece"):
    """A SentencePiece model trained on about `sample_bytes` of the training documents.

    Text is taken as it is (no normalisation, no added spaces), and what is not in the vocabulary is spelled
    in bytes, so any text comes back exactly. `vocabulary` counts everything: 256 bytes, eot, <unk>, and the
    characters that cover `character_coverage` of the sample. Training is deterministic.
    """

    algorithm: Literal["bpe", "unigram"] = "bpe"
    vocabulary: int = 2048
    sample_bytes: int = 1 << 22
    character_coverage: float = 0.9995

    def validate(self) -> None:
        if not 260 <= self.vocabulary <= 1 << 20:
            raise UserError(f"data.tokenizer.vocabulary is {self.vocabulary}; it must lie in 260 .. 1048576")
        if not 0.9 <= self.character_coverage <= 1:
            raise UserError(
                f"data.tokenizer.character_coverage is {self.character_coverage}; it lies in 0.9 .. 1"
            )
        if self.sample_bytes < 1:
            raise UserError(f"data.tokenizer.sample_bytes is {self.sample_bytes}; it must be at least 1")

    def size(self) -> int:
        return self.vocabulary

    def open(self, sample: Sample, content: str) -> Codec:
        self.validate()
        key = digest([2, _library("sentencepiece"), dataclasses.astuple(self), content])
        path = once(
            cache_folder() / "tokenizers" / f"{key}.model",
            lambda partial: partial.write_bytes(self.train(sample(self.sample_bytes))),
        )
        return SentencePieceCodec(path.read_bytes(), cut=True)

    def train(self, texts: Iterator[str]) -> bytes:
        """The trained model. Raises UserError where the texts support only another size of vocabulary."""
        import sentencepiece

        if sys.stderr.isatty():
            print(f"training a {self.algorithm} tokenizer of {self.vocabulary:,} tokens", file=sys.stderr)
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(
                    chunk.replace(_SPACE, "")
                    for text in texts
                    for chunk in readers.cut((text,), _CHUNK_CHARACTERS)
                ),
                model_writer=written,
                model_type=self.algorithm,
                vocab_size=self.vocabulary,
                character_coverage=self.character_coverage,
                seed_sentencepiece_size=10 * self.vocabulary,  # unigram's first vocabulary, pruned from there
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * _CHUNK_CHARACTERS,
                unk_id=0,
                eos_id=1,
                eos_piece="<eot>",
                bos_id=-1,
                pad_id=-1,
                num_threads=1,  # sums in a fixed order
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(_about_vocabulary(self.vocabulary, str(error))) from error
        return written.getvalue()


@dataclasses.dataclass(frozen=True)
class FromFile(Tokenizer):
    """A tokenizer as it stands in a file, which is read again only when it has changed."""

    path: str = outside_identity("")

    def size(self) -> int:
        return self.open().vocabulary

    def open(self, sample: Sample | None = None, content: str = "") -> Codec:
        return _opened(self, *_stamp(self.path))[0]

    def content(self) -> str:
        return _opened(self, *_stamp(self.path))[1]

    def id_of(self, name: str) -> int | None:
        return self.open().id_of(name)

    def named(self, template: str) -> Template:
        return self.open().named(template)

    def codec(self, data: bytes) -> Codec:
        """What the file's content does. Raises UserError if it isn't such a file."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SentencePieceFile(FromFile, kind="sentencepiece_file"):
    """A SentencePiece `.model` as it is; with none of its own, eot is one more id."""

    def codec(self, data: bytes) -> Codec:
        try:
            if not data:  # which the library takes, and complains of later
                raise RuntimeError
            return SentencePieceCodec(data, cut=False)
        except RuntimeError:
            raise UserError(f"{self.path}: not a SentencePiece model") from None


@dataclasses.dataclass(frozen=True)
class HuggingFace(FromFile, kind="huggingface"):
    """A Hugging Face `tokenizer.json`. `eot` names its token that ends a text; None: one more id."""

    eot: str | None = None

    def codec(self, data: bytes) -> Codec:
        return HuggingFaceCodec(data, self.path, self.eot)


_SPACE = "\u2581"  # SentencePiece's own sign for a space; the same character in a text is spelled in bytes


class SentencePieceCodec:
    """A SentencePiece model. `cut`: chunks of a few kilobytes, cut at line ends, are encoded by themselves.

    So trained models encode; a loaded one encodes a text as a whole, as everybody else's does.
    """

    holes = False

    def __init__(self, model: bytes, cut: bool) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._cut, size, eos = cut, self._processor.get_piece_size(), self._processor.eos_id()
        self.eot = eos if eos >= 0 else size
        self.vocabulary = max(size, self.eot + 1)
        self.fingerprint = digest(model) + ("-cut" if cut else "")
        self.library = _library("sentencepiece")
        self._sign = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        chunks = [list(self._chunks(text)) for text in texts]
        flat = list(itertools.chain.from_iterable(chunks))
        found = iter(self._processor.encode(flat, num_threads=_threads()))
        return [self._join(chunk, [next(found) for _ in chunk]) for chunk in chunks]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i != self.eot])

    def id_of(self, name: str) -> int | None:
        return None

    def named(self, template: str) -> Template:
        return named(template)

    def _chunks(self, text: str) -> Iterator[str]:
        """What is encoded by itself: between two chunks stands either nothing or a sign to be spelled."""
        if not self._cut:
            yield text
            return
        for chunk in readers.cut((text,), _CHUNK_CHARACTERS):
            yield from re.split(f"({_SPACE})", chunk)

    def _join(self, chunks: list[str], ids: list[list[int]]) -> np.ndarray:
        spelled = (
            self._sign if self._cut and chunk == _SPACE else i for chunk, i in zip(chunks, ids, strict=True)
        )
        return np.fromiter(itertools.chain.from_iterable(spelled), np.int32)


class HuggingFaceCodec:
    """A `tokenizer.json`: no special tokens are added, and their names in a text are text."""

    def __init__(self, data: bytes, path: str, eot: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        if eot is not None and eot not in names:
            hint = readers.near(eot, names, "--config.data.tokenizer.eot=none adds one")
            raise UserError(f"{path}: no token {eot!r}; {hint}")
        size = max(names.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = tuple(token.content for token in added.values() if token.special)
        self._roles = () if eot is None else (("bos_token", eot), ("eos_token", eot))
        last = self._tokenizer.get_vocab_size(with_added_tokens=False) - 1
        self.holes = size - 1 != max([last, *added])
        self.data = data.decode()
        self.eot = size if eot is None else names[eot]
        self.vocabulary = max(size, self.eot + 1)
        self.fingerprint = digest([digest(data), self.eot])
        self.library = _library("tokenizers")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(row.ids, np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eot], skip_special_tokens=False)

    def id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def named(self, template: str) -> Template:
        return named(template, self._special, self._roles)


def _library(name: str) -> str:
    """A library with its version: another may train another model, or encode otherwise."""
    return f"{name} {importlib.metadata.version(name)}"


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stamp(path: str) -> tuple[pathlib.Path, int, int]:
    """Place, size and time of a file; raises UserError with the nearest existing name."""
    place = pathlib.Path(os.path.expanduser(path))
    if not place.is_file():
        files = [str(file) for file in place.parent.glob("*") if file.suffix in _FILES and file.is_file()]
        raise UserError(f"no tokenizer file {path!r}; {readers.near(path, files, 'give its path')}")
    facts = place.stat()
    return place.resolve(), facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _opened(tokenizer: FromFile, place: pathlib.Path, size_bytes: int, time_ns: int) -> tuple[Codec, str]:
    """The codec and the hash of a tokenizer's file as it stands: parsing a large one takes a second."""
    data = place.read_bytes()
    try:
        codec = tokenizer.codec(data)
        codec.encode("a")
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare exceptions
        raise UserError(f"{tokenizer.path} can't be used as a tokenizer: {error}") from None
    return codec, digest(data)


def _about_vocabulary(vocabulary: int, message: str) -> str:
    """SentencePiece's refusal in words that say what would be right."""
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"data.tokenizer.vocabulary={vocabulary} is too small: bytes and characters of this corpus take "
            f"{found[1]}; raise it or lower data.tokenizer.character_coverage"
        )
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"data.tokenizer.vocabulary={vocabulary} is larger than the corpus supports: at most "
            f"{found[1]} for its training documents"
        )
    return f"SentencePiece can't train on this corpus: {message}"
