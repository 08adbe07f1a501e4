"""Tokenizers: text to token ids and back without loss."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from llm_jax.config import Tagged


class Codec(Protocol):
    """A tokenizer at work. `decode(encode(text)) == text`; `eot` stands before each document."""

    vocabulary: int
    eot: int
    fingerprint: str  # changes where any text may be encoded otherwise

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


Sample = Callable[[int], Iterator[str]]  # about so many bytes of the training documents


class Tokenizer(Tagged):
    """Root of the tokenizers' configs."""

    @classmethod
    def parse(cls, text: str) -> "Tokenizer":
        return super().parse(text)

    def size(self) -> int:
        """The number of token ids."""
        raise NotImplementedError

    def open(self, sample: Sample, content: str) -> Codec:
        """The codec, trained on `sample` of the corpus `content` (its hash) where it is trained at all."""
        raise NotImplementedError

    def content(self) -> str | None:
        """The hash of the file behind it, if there is one: a part of a run's identity."""
        return None


@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer, kind="bytes"):
    """Each byte of the UTF-8 text is a token; 256 ends a text."""

    vocabulary = 257
    eot = 256
    fingerprint = "bytes"

    def size(self) -> int:
        return self.vocabulary

    def open(self, sample: Sample, content: str) -> "Bytes":
        return self

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.eot).decode("utf-8", "replace")
