"""The token store: every document of a corpus as token ids, memory-mapped.

A folder of `tokens.bin` (each document is eot and its tokens), `documents.npy` (hash, bytes, tokens of each)
and `store.json` (counts and dtype, written last). Its name is a hash of the texts and of the tokenizer, so a
stale one can't be used.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.cache import cache_folder, digest, once
from llm_jax.data.catalogue import Catalogue, hash_of, progress, texts
from llm_jax.data.corpora import Corpus
from llm_jax.data.tokenizers import Codec

_DOCUMENT = np.dtype([("hash", "<u8"), ("bytes", "<i8"), ("tokens", "<i8")])
_BATCH_CHARACTERS = 1 << 22  # encoded at once, by the tokenizer's own threads


@dataclasses.dataclass(frozen=True)
class Store:
    """tokens: uint16 or uint32 [tokens], memory-mapped; hashes, sizes_bytes, lengths, starts: [documents]."""

    folder: pathlib.Path
    tokens: np.ndarray
    hashes: np.ndarray
    sizes_bytes: np.ndarray
    lengths: np.ndarray  # tokens of each document, eot included

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths


def tokenize(corpus: Corpus, found: Catalogue, codec: Codec) -> Store:
    """The corpus's token store, made where it is missing; continues one that was interrupted.

    Memory stays bounded by a batch of documents. Raises UserError where files changed since they were
    catalogued, and where the store was truncated.
    """
    key = digest([2, found.content, codec.fingerprint, codec.library])
    return open_store(
        once(cache_folder() / "tokens" / key, lambda folder: _build(folder, corpus, found, codec))
    )


def open_store(folder: pathlib.Path) -> Store:
    """Maps a finished store; raises UserError where its files don't have the sizes it was written with."""
    facts = json.loads((folder / "store.json").read_text())
    dtype = np.dtype(facts["dtype"])
    expected = {"tokens.bin": facts["tokens"] * dtype.itemsize, "documents.npy": facts["index_bytes"]}
    for name, size in expected.items():
        path = folder / name
        real = path.stat().st_size if path.exists() else 0
        if real != size:
            raise UserError(
                f"the token store {path} has {real} bytes, not {size}: delete {folder} and run again"
            )
    documents = np.load(folder / "documents.npy")
    tokens = np.memmap(folder / "tokens.bin", dtype, "r")
    return Store(folder, tokens, documents["hash"], documents["bytes"], documents["tokens"])


def _build(folder: pathlib.Path, corpus: Corpus, found: Catalogue, codec: Codec) -> None:
    """Tokens and lengths are appended batch by batch; `progress.json` says how much of them is sound."""
    dtype = np.dtype("<u2" if codec.vocabulary <= 1 << 16 else "<u4")
    journal, order = folder / "progress.json", digest(found.hashes.tobytes())
    done = json.loads(journal.read_text()) if journal.exists() else {"order": None}
    if done["order"] != order:  # a new store, or the same texts in another order of files
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        done = {"order": order, "documents": 0, "tokens": 0}
    skip, sizes = done["documents"], found.sizes_bytes
    remaining = itertools.islice(texts(corpus, found.longest), skip, None)
    with (
        _append(folder / "tokens.bin", done["tokens"] * dtype.itemsize) as tokens,
        _append(folder / "lengths.bin", skip * 8) as lengths,
        progress(f"tokenizing {corpus.name}", int(sizes.sum()), int(sizes[:skip].sum())) as bar,
    ):
        for batch in _batches(text for _, text in remaining):
            rows = [np.append(codec.eot, row).astype(dtype) for row in codec.encode_batch(batch)]
            np.concatenate(rows).tofile(tokens)
            np.array([len(row) for row in rows], "<i8").tofile(lengths)
            for file in (tokens, lengths):
                file.flush()
                os.fsync(file.fileno())
            start = done["documents"]
            done["documents"] += len(rows)
            done["tokens"] += sum(map(len, rows))
            _write(journal, done)
            data = [text.encode() for text in batch]
            if [hash_of(each) for each in data] != found.hashes[start : done["documents"]].tolist():
                raise UserError(
                    f"the files of the corpus {corpus.name} changed while they were read; run again"
                )
            bar.update(sum(map(len, data)))
    documents = np.empty(len(sizes), _DOCUMENT)
    documents["hash"], documents["bytes"] = found.hashes, sizes
    documents["tokens"] = np.fromfile(folder / "lengths.bin", "<i8")
    np.save(folder / "documents.npy", documents)
    index_bytes = (folder / "documents.npy").stat().st_size
    _write(folder / "store.json", {"dtype": dtype.str, "tokens": done["tokens"], "index_bytes": index_bytes})
    (folder / "lengths.bin").unlink()
    journal.unlink()


def _batches(items: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about _BATCH_CHARACTERS characters each."""
    batch, characters = [], 0
    for text in items:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append(path: pathlib.Path, size_bytes: int) -> BinaryIO:
    """`path` opened for writing after its first `size_bytes`; what stood behind them is dropped."""
    path.touch()
    file = open(path, "r+b")  # noqa: SIM115
    file.truncate(size_bytes)
    file.seek(size_bytes)
    return file


def _write(path: pathlib.Path, value: dict) -> None:
    """JSON, whole or not at all, even after a crash (the like in records.py stands above data)."""
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
