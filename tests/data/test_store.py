import json
import threading
import time

import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.data import Bytes, Files, Text, store
from llm_jax.data.cache import once
from llm_jax.data.catalogue import catalogue, texts


class Counting(Bytes):
    """The bytes tokenizer; it counts the texts it encodes and is killed before the batch `stop`."""

    def __init__(self, stop: int = 10**9) -> None:
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "stop", stop)

    def encode_batch(self, batch):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(len(batch))
        return super().encode_batch(batch)


@pytest.fixture
def files(corpus, monkeypatch) -> Files:
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 2000)
    return Files((str(corpus),))


def contents(made: store.Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def test_the_store_holds_every_document_after_its_eot(files):
    found = catalogue(files)
    made = store.tokenize(files, found, Bytes())
    documents = [text for _, text in texts(files, found.longest)]
    assert len(documents) == len(made.lengths) == 40
    for text, start, length, size in zip(documents, made.starts, made.lengths, made.sizes_bytes, strict=True):
        ids = made.tokens[start : start + length]
        assert ids[0] == 256 and Bytes().decode(ids[1:]) == text
        assert size == len(text.encode()) == length - 1
    assert made.tokens.dtype == np.uint16 and len(made.tokens) == made.lengths.sum()


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_an_interrupted_store_continues_where_it_was(files, cache, stop):
    found, codec = catalogue(files), Counting(stop)
    with pytest.raises(KeyboardInterrupt):
        store.tokenize(files, found, codec)
    (partial,) = (cache / "tokens").glob("*.partial")
    with open(partial / "tokens.bin", "ab") as file:  # killed while it wrote
        file.write(b"half a batch")
    again = Counting()
    made = store.tokenize(files, found, again)
    assert sum(codec.seen) + sum(again.seen) == 40
    expected = contents(made)
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()
    assert contents(store.tokenize(files, found, Bytes())) == expected


def test_what_was_begun_with_another_order_of_files_is_begun_again(files, corpus):
    with pytest.raises(KeyboardInterrupt):
        store.tokenize(files, catalogue(files), Counting(3))
    (corpus / "00.txt").rename(corpus / "99.txt")
    found = catalogue(files)
    made = store.tokenize(files, found, Bytes())
    _, last = list(texts(files, found.longest))[-1]
    assert last.startswith("0:")
    assert Bytes().decode(made.tokens[made.starts[-1] :]) == last


def test_another_text_or_tokenizer_has_another_store(files, corpus):
    first = store.tokenize(files, catalogue(files), Bytes()).folder
    codec = Counting()
    assert store.tokenize(files, catalogue(files), codec).folder == first and not codec.seen
    object.__setattr__(codec, "library", "another version")
    assert store.tokenize(files, catalogue(files), codec).folder != first
    object.__setattr__(codec, "library", Bytes.library)
    object.__setattr__(codec, "fingerprint", "other")
    assert store.tokenize(files, catalogue(files), codec).folder != first
    (corpus / "00.txt").write_text("changed")
    assert store.tokenize(files, catalogue(files), Bytes()).folder != first


def test_large_vocabularies_take_four_bytes(files):
    codec = Counting()
    object.__setattr__(codec, "fingerprint", "wide")
    object.__setattr__(codec, "vocabulary", 100_000)
    assert store.tokenize(files, catalogue(files), codec).tokens.dtype == np.uint32


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy"])
def test_a_truncated_store_is_refused(files, name):
    text = Text(files, sequence_length=16, batch_size=2)
    text.open()
    folder = store.tokenize(files, catalogue(files), Bytes()).folder
    data = (folder / name).read_bytes()
    for damaged in (data[:-1], b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name} has {len(damaged)} bytes, not {len(data)}: delete"):
            text.open()


@pytest.mark.parametrize("change", [lambda text: "short", lambda text: text[::-1]], ids=["size", "letters"])
def test_files_that_change_while_they_are_read_are_refused(files, corpus, cache, change):
    found = catalogue(files)
    place = corpus / "20.txt"
    place.write_text(change(place.read_text()))
    with pytest.raises(UserError, match="changed while they were read"):
        store.tokenize(files, found, Bytes())
    assert not any((cache / "tokens").iterdir())


def test_of_several_builders_one_builds_and_the_others_wait(cache):
    built, building, refused = [], threading.Lock(), []

    def build(partial):
        assert building.acquire(blocking=False)  # never two at once
        built.append(threading.get_ident())
        time.sleep(0.02)
        building.release()
        if len(built) <= 2:
            raise UserError("not yet")
        partial.write_text("whole")

    def attempt():
        try:
            once(cache / "thing", build)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), len(refused)) == (3, 2)
    assert [(path.name, path.read_text()) for path in cache.iterdir()] == [("thing", "whole")]


def test_a_cache_that_cannot_be_written_is_one_line(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LLM_JAX_CACHE"):
        Text(Files((str(corpus),))).open()


def test_nothing_of_a_bad_corpus_is_left_behind(corpus, cache):
    (corpus / "30.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"30\.txt"):
        Text(Files((str(corpus),))).open()
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert json.dumps(Files((str(corpus),)).stamp())
