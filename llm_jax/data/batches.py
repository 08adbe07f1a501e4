"""Pretraining text as rows: documents one after the other, cut into windows, in a shuffled order.

A source's stream is its documents in their order (see catalogue.py), each as [eot, t1 .. tn], and an eot.
Window w holds the tokens w*T .. w*T+T-1 and, one further on, their targets: so every token is a target once,
the eot that ends a document too. A global row is one source's turn (see windows.py), that source's row i is
window shuffled(i mod windows) of epoch i // windows.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.config import UserError
from llm_jax.data.cache import digest
from llm_jax.data.catalogue import Catalogue, catalogue, sample, split
from llm_jax.data.corpora import Corpus, Python, Weighted
from llm_jax.data.markov import Markov
from llm_jax.data.sources import Batch, DataConfig, HeldOut, Source
from llm_jax.data.store import Store, tokenize
from llm_jax.data.tokenizers import Bytes, Codec, FromFile, Tokenizer
from llm_jax.data.windows import BLOCK, Stream, mix, shuffled, turns
from llm_jax.values import check_least

_CHECKED_BYTES = 1 << 16  # of text that a tokenizer has to give back


@dataclasses.dataclass(frozen=True)
class Text(DataConfig, kind="text"):
    """Text to be continued: rows of `sequence_length` tokens with their targets.

    document_mask: attention stays within a document, whose positions start at 0. unique_tokens: train on so
    many tokens only, a beginning of the training documents' order. Held out are `held_out_fraction` of the
    documents of each source, as far as they have `held_out_bytes`, whatever the tokenizer and the batch.
    """

    corpus: Corpus = Python()
    tokenizer: Tokenizer = Bytes()
    sequence_length: int = 256
    batch_size: int = 16
    document_mask: bool = True
    unique_tokens: int | None = None
    repeat: bool = False  # rows past the first epoch are given instead of refused
    held_out_fraction: float = 0.05
    held_out_bytes: int = 1 << 22

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.size()

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def fields(self) -> tuple[str, ...]:
        """What a row tells beside its tokens, targets and mask."""
        return ("segments", "positions") if self.document_mask else ()

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.batch_size, self.sequence_length)
        names = ("tokens", "targets", *self.fields)
        mask = {"mask": jax.ShapeDtypeStruct(shape, np.float32)}
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names} | mask

    def validate(self) -> None:
        check_least(self, "data.", sequence_length=1, batch_size=1, held_out_bytes=1, unique_tokens=1)
        if not 0 <= self.held_out_fraction <= 0.5:
            raise UserError(f"data.held_out_fraction is {self.held_out_fraction}; it lies between 0 and 0.5")
        if self.unique_tokens is not None and len(self.corpus.sources()) > 1:
            raise UserError("data.unique_tokens limits a single corpus; in a mixture set it for each part")

    def fingerprint(self) -> dict[str, Any]:
        """What the texts and a tokenizer's file add to a run's identity, wherever they lie."""
        found = {"content": [catalogue(part.corpus).content for part in self.corpus.sources()]}
        file = self.tokenizer.content()
        return found | ({"tokenizer_content": file} if file else {})

    def open(self) -> "TextSource":
        """Catalogues, splits, tokenizes and maps the corpus, as far as the cache doesn't have it."""
        self.validate()
        parts = self.corpus.sources()
        found = [catalogue(part.corpus) for part in parts]
        training = [train for _, train in self.splits(found)]
        total = sum(part.weight for part in parts)

        def texts(most_bytes: int) -> Iterator[str]:
            for part, item, chosen in zip(parts, found, training, strict=True):
                share = math.ceil(most_bytes * part.weight / total)
                yield from sample(part.corpus, item, chosen, share)

        facts = [(item.content, part.weight / total) for part, item in zip(parts, found, strict=True)]
        content = digest([facts, self.held_out_fraction, self.held_out_bytes])
        codec = self.tokenizer.open(texts, content)
        lossless = all(codec.decode(codec.encode(text)) == text for text in texts(_CHECKED_BYTES))
        if not lossless:
            name = self.tokenizer.path if isinstance(self.tokenizer, FromFile) else self.tokenizer.kind
            told = f"the tokenizer {name} loses some of these texts: bits per byte count what is left"
            print(told, file=sys.stderr)
        stores = [tokenize(part.corpus, item, codec) for part, item in zip(parts, found, strict=True)]
        return TextSource(self, codec, found, stores, lossless)

    def parts(self) -> tuple[Weighted, ...]:
        """What rows are drawn from: the corpus, or the parts of a mixture."""
        parts = self.corpus.sources()
        return parts if len(parts) > 1 else (dataclasses.replace(parts[0], unique_tokens=self.unique_tokens),)

    def splits(self, found: Sequence[Catalogue | Store]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(held-out, training) numbers of each part's documents; what one holds out, none trains on."""
        parts = []
        for part, item in zip(self.corpus.sources(), found, strict=True):
            limits = self.held_out_fraction, self.held_out_bytes
            parts.append(split(item.hashes, item.sizes_bytes, *limits, part.corpus.name))
        held = np.concatenate([item.hashes[out] for item, (out, _) in zip(found, parts, strict=True)])
        return [
            (out, train[~np.isin(item.hashes[train], held)])
            for item, (out, train) in zip(found, parts, strict=True)
        ]


class TextSource(Source):
    """Rows of one corpus or of a mixture; `codec` encodes and decodes their tokens."""

    def __init__(
        self, config: Text, codec: Codec, found: list[Catalogue], stores: list[Store], lossless: bool
    ) -> None:
        self.spec, self._fields = config.spec, config.fields
        self.config, self.codec, self._catalogues, self._lossless = config, codec, found, lossless
        self._parts, length = config.parts(), config.sequence_length
        splits = config.splits(stores)
        self._streams = [Stream(store, train) for store, (_, train) in zip(stores, splits, strict=True)]
        self._windows = np.array(
            [self._windows_of(number, part.unique_tokens) for number, part in enumerate(self._parts)]
        )
        self._turns, self._ranks = turns(tuple(part.weight for part in self._parts))
        self._shares = np.bincount(self._turns)
        rows = self._rows_of_one_epoch()
        self.available_tokens = None if config.repeat else rows * length
        if rows < config.batch_size:
            tokens = sum(
                part.unique_tokens or stream.size
                for part, stream in zip(self._parts, self._streams, strict=True)
            )
            raise UserError(
                f"the corpus {config.corpus.name} has {tokens:,} tokens to train on, and a batch takes "
                f"{config.batch_size} rows of {length}, {config.tokens_per_step:,}: give it more text, or "
                "lower --config.data.batch_size or --config.data.sequence_length"
            )
        # After the refusal: a last window is filled up, however long it is.
        self._held_out = [
            Stream(store, held, closing=length + 1)
            for store, (held, _) in zip(stores, splits, strict=True)
            if len(held)
        ]

    def rows(self, seed: int, indices: np.ndarray) -> Batch:
        """tokens, targets, segments, positions int32 and mask float32, each [len(indices), sequence_length].

        Raises UserError for rows past the first epoch of a source, unless the config says `repeat`.
        """
        indices = np.asarray(indices, np.int64)
        block, turn = np.divmod(indices, BLOCK)
        which = self._turns[turn]
        row = block * self._shares[which] + self._ranks[turn]
        epoch, place = np.divmod(row, self._windows[which])
        if epoch.any() and not self.config.repeat:
            late = int(np.argmax(epoch > 0))
            raise UserError(
                f"row {indices[late]} lies past the first epoch of {self._names[which[late]]}: train on at "
                f"most {self.available_tokens:,} tokens, or set --config.data.repeat=true"
            )
        key = mix(mix(mix(which.astype(np.uint64)) + np.uint64(seed % (1 << 64))) + epoch.astype(np.uint64))
        first = shuffled(place, self._windows[which], key) * self.config.sequence_length
        out = self._gather(self._streams, which, first, self._fields)
        return out | {"mask": np.ones(out["tokens"].shape, np.float32)}

    def held_out(self) -> HeldOut | None:
        streams = self._held_out
        if not streams:
            return None
        sizes, length = np.array([stream.size for stream in streams]), self.config.sequence_length
        first = [np.arange(0, size, length) for size in sizes]
        which = np.repeat(np.arange(len(streams)), [len(part) for part in first])
        first = np.concatenate(first)
        base = np.cumsum([0] + [stream.documents for stream in streams]).astype(np.int32)

        def rows(indices: np.ndarray) -> Batch:
            chosen = np.minimum(indices, len(first) - 1)
            some, begin = which[chosen], first[chosen]
            out = self._gather(streams, some, begin, (*self._fields, "document"))
            out["document"] = out["document"] + base[some][:, None]
            ends = np.where(indices < len(first), sizes[some], 0)
            inside = begin[:, None] + np.arange(length) < ends[:, None]
            return out | {"mask": inside.astype(np.float32)}

        size_bytes = sum(stream.bytes for stream in streams)
        documents = [stream.documents for stream in streams]
        parts = tuple(zip(self._names, documents, strict=True)) if len(streams) > 1 else ()
        return HeldOut(rows, len(first), int(sizes.sum()), size_bytes, int(base[-1]), parts)

    def epochs(self, rows: int) -> dict[str, float]:
        blocks, rest = divmod(rows, BLOCK)
        count = len(self._parts)
        seen = blocks * self._shares + np.bincount(self._turns[:rest], minlength=count)
        return dict(zip(self._names, (seen / self._windows).tolist(), strict=True))

    @functools.cached_property
    def _names(self) -> list[str]:
        """The sources' names; in a mixture numbered, since two may be called alike."""
        names = [part.corpus.name for part in self._parts]
        return names if len(names) == 1 else [f"{number}:{name}" for number, name in enumerate(names)]

    @property
    def record(self) -> dict[str, Any]:
        length, sources = self.config.sequence_length, []
        for number, (part, found) in enumerate(zip(self._parts, self._catalogues, strict=True)):
            train = self._streams[number]
            facts = {
                "corpus": self._names[number],
                "content": found.content,
                "documents": found.uncut,
                "pieces": len(found.hashes),
                "bytes": int(found.sizes_bytes.sum()),
                "weight": part.weight,
                "train_documents": train.documents,
                "train_bytes": train.bytes,
                "train_tokens": train.size,
                "unique_tokens": int(self._windows[number]) * length,
            }
            if len(found.hashes) > found.uncut:
                facts["cut"] = (
                    f"documents longer than {found.longest} characters were cut at line ends; each piece "
                    "counts as a document of its own when some are held out and in the standard error"
                )
            if isinstance(part.corpus, Markov) and isinstance(self.config.tokenizer, Bytes):
                facts["entropy"] = part.corpus.entropy(length)  # nats per token
            sources.append(facts)
        held = self.held_out()
        scored = {"documents": held.documents, "bytes": held.bytes, "tokens": held.tokens} if held else None
        tokenizer = {"kind": self.config.tokenizer.kind, "vocabulary": self.codec.vocabulary}
        tokenizer |= {"fingerprint": self.codec.fingerprint, "library": self.codec.library}
        facts = {"sources": sources, "tokenizer": tokenizer, "held_out": scored}
        return facts if self._lossless else facts | {"tokenizer_loses_text": True}

    def _windows_of(self, number: int, unique_tokens: int | None) -> int:
        """How many windows of a source may be used."""
        size, single = self._streams[number].size, len(self._parts) == 1
        if unique_tokens is not None and not 0 < unique_tokens <= size:
            field = "data.unique_tokens" if single else f"data.corpus.parts.{number}.unique_tokens"
            raise UserError(
                f"{field} is {unique_tokens:,}, but {self._names[number]} has {size:,} tokens to train on"
            )
        return (size if unique_tokens is None else unique_tokens) // self.config.sequence_length

    def _rows_of_one_epoch(self) -> int:
        """Global rows before any source would begin its second epoch."""
        blocks, rest = np.divmod(self._windows, self._shares)
        turn = [np.flatnonzero(self._turns == i)[extra] for i, extra in enumerate(rest)]
        return int(np.min(blocks * BLOCK + turn))

    def _gather(
        self, streams: list[Stream], which: np.ndarray, first: np.ndarray, fields: tuple[str, ...]
    ) -> Batch:
        """The window at first[i] of the stream which[i], for all i."""
        length, out = self.config.sequence_length, {}
        if len(streams) == 1:
            return streams[0].windows(first, length, fields)
        for number, stream in enumerate(streams):
            chosen = np.flatnonzero(which == number)
            for name, value in stream.windows(first[chosen], length, fields).items():
                out.setdefault(name, np.empty((len(which), length), np.int32))[chosen] = value
        return out
