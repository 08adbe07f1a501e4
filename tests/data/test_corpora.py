import dataclasses
import gzip
import json
import lzma
import random
import shutil
import sysconfig

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.data import Corpus, Files, Markov, Mixture, Python, Text, Weighted, corpora
from llm_jax.data.catalogue import catalogue, split, texts
from llm_jax.data.corpora import Corpus as Root
from llm_jax.data.readers import cut

TEXTS = [f"text {number}\r\nwith 😀 and é\n" * (number + 1) for number in range(25)]


def read(corpus: Corpus) -> list[str]:
    return ["".join(document) for document in corpus.documents()]


def write(folder, form: str, texts: list[str]) -> None:
    if form == ".txt":
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_bytes(text.encode())
    elif form == ".jsonl":
        lines = [
            json.dumps({"id": 1, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)
        ]
        (folder / "all.jsonl").write_bytes("\n".join(lines).encode())
    else:
        table = pyarrow.table({"other": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, folder / "all.parquet")


PACK = {"": None, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": pyarrow.Codec("zstd").compress}


@pytest.mark.parametrize("form", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("packed", PACK)
def test_a_text_is_the_same_in_every_format(tmp_path, form, packed):
    write(tmp_path, form, TEXTS)
    if packed:
        for path in list(tmp_path.iterdir()):
            path.with_name(path.name + packed).write_bytes(PACK[packed](path.read_bytes()))
            path.unlink()
    assert read(Files((str(tmp_path),))) == TEXTS
    (plain := tmp_path / "plain").mkdir()
    write(plain, ".txt", TEXTS)
    packed_files = Files((str(tmp_path / "*.*"),))
    assert catalogue(packed_files).content == catalogue(Files((str(plain),))).content


def test_the_order_and_names_of_files_change_nothing(tmp_path):
    def prepared(name: str, order: list[str]) -> Text:
        (folder := tmp_path / name).mkdir()
        write(folder, ".txt", order)
        return Text(Files((str(folder),)), sequence_length=32, batch_size=2)

    one = prepared("one", TEXTS)
    other = prepared("other", random.Random(0).sample(TEXTS, len(TEXTS)))
    assert config.identity(one, 1) == config.identity(other, 1)
    rows = np.arange(10)
    np.testing.assert_array_equal(one.open().rows(0, rows)["tokens"], other.open().rows(0, rows)["tokens"])
    changed = prepared("changed", [*TEXTS[:-1], TEXTS[-1] + "!"])
    assert config.identity(one, 1) != config.identity(changed, 1)


def test_a_changed_file_is_read_again(corpus):
    files = Files((str(corpus),))
    before = catalogue(files).content
    assert catalogue(files).content == before
    (corpus / "07.txt").write_text("something else")
    assert catalogue(files).content != before


def test_the_default_corpus_is_the_standard_library_without_tests():
    names = [path.as_posix() for path in Python()._paths()]
    assert names == sorted(names)
    assert any(name.endswith("/dataclasses.py") for name in names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)
    found = catalogue(Python())
    assert 5e6 < found.sizes_bytes.sum() < 5e7
    assert catalogue(Python()).content == found.content


def test_installed_packages_join_the_standard_library_on_demand(tmp_path, monkeypatch):
    folders = {
        "stdlib": tmp_path / "lib",
        "purelib": tmp_path / "lib/site-packages",
        "platlib": tmp_path / "64",
    }
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]))
    kept = ["lib/ast.py", "lib/site-packages/pure/core.py", "64/fast.py"]
    left_out = ["lib/test/a.py", "lib/site-packages/pure/tests/b.py", "64/c.pyi", "64/llm_jax/d.py"]
    left_out += ["lib/site-packages/__editable___e_finder.py"]  # holds the path of a checkout
    for name in kept + left_out:
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    whole = Text(Python(packages=True))
    corpora._installed.cache_clear()
    assert read(whole.corpus) == [f"# {name}\n" for name in sorted(kept)]
    assert read(Python()) == ["# lib/ast.py\n"]
    assert whole.fingerprint() != Text(Python()).fingerprint()

    before = whole.fingerprint()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "lib", moved / "lib")
    shutil.copytree(tmp_path / "64", moved / "64")
    folders |= {name: moved / path.relative_to(tmp_path) for name, path in folders.items()}
    corpora._installed.cache_clear()
    assert whole.fingerprint() == before
    (moved / "64/fast.py").write_text("# changed\n")
    corpora._installed.cache_clear()
    assert whole.fingerprint() != before


def test_a_single_long_text_is_cut_at_line_ends_so_that_some_can_be_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {number}\n" for number in range(5000)))
    files = Files((str(tmp_path / "one.txt"),))
    found = catalogue(files)
    assert found.uncut == 1 and len(found.hashes) > 100
    pieces = [text for _, text in texts(files, found.longest)]
    assert "".join(pieces) == (tmp_path / "one.txt").read_text()
    assert all(piece.endswith("\n") for piece in pieces)
    source = Text(files, sequence_length=32, batch_size=2).open()
    assert source.held_out().documents >= 1
    assert "standard error" in source.record["sources"][0]["cut"]


def test_cutting_loses_nothing_and_keeps_to_its_limit():
    text = "word " * 300 + "\n" + "x" * 777 + "\nshort\n" + "é\n" * 50
    chunks = [text[i : i + 37] for i in range(0, len(text), 37)]
    for longest in (16, 100, 10_000):
        pieces = list(cut(chunks, longest))
        assert "".join(pieces) == text == "".join(cut([text], longest))
        assert max(map(len, pieces)) <= longest
    assert all(not piece.endswith(" ") for piece in list(cut(chunks, 16))[:50])  # spaces begin pieces


def test_held_out_documents_do_not_depend_on_tokenizer_batch_or_window(corpus):
    files = Files((str(corpus),))
    small = Text(files, sequence_length=16, batch_size=2).open().held_out()
    large = Text(files, sequence_length=64, batch_size=8).open().held_out()
    assert (small.bytes, small.documents, small.tokens) == (large.bytes, large.documents, large.tokens)


def test_a_document_keeps_its_side_when_others_come_and_copies_stay_together():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 63, 1000).astype(np.uint64)
    sizes = np.full(1000, 10)
    held, training = split(hashes, sizes, 0.1, 1 << 40, "texts")
    assert len(held) == 100 and len(training) == 900
    assert hashes[held].max() < hashes[training].min()
    fewer, _ = split(hashes, sizes, 0.1, 55, "texts")  # a limit in bytes takes the first of the same order
    assert list(fewer) == list(held[:5])
    copied = np.repeat(hashes, 3)
    held, training = split(copied, np.full(3000, 10), 0.1, 1 << 40, "texts")
    assert not set(copied[held]) & set(copied[training])


def test_a_path_on_the_command_line_stands_for_files(corpus):
    base = Text()
    assert config.override(base, "corpus", "markov").corpus == Markov()
    pattern = str(corpus / "*.txt")
    assert config.override(base, "corpus", pattern).corpus == Files((pattern,))
    changed = config.override(config.override(base, "corpus.kind", "markov"), "corpus.states", "8")
    assert changed.corpus.states == 8


def test_configs_of_corpora_survive_json(corpus):
    mixed = Mixture((Weighted(Python(), 0.7), Weighted(Files((str(corpus),)), 0.3, unique_tokens=100)))
    text = dataclasses.replace(Text(), corpus=mixed)
    assert config.from_json(Text, json.loads(json.dumps(config.to_json(text)))) == text


# ---- what a user can get wrong ----


def says(corpus: Corpus, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        catalogue(corpus)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_missing_corpus_is_named_with_the_nearest_that_exists(corpus, monkeypatch):
    says(Files((str(corpus / "00.tx"),)), "00.tx", f"did you mean {str(corpus / '00.txt')!r}")
    says(Files((str(corpus.parent / "textz" / "*.txt"),)), f"did you mean {str(corpus)!r}")
    says(Files((str(corpus / "*.jsonl"),)), "*.jsonl")
    says(Files(()), "--config.data.corpus=")
    (corpus / "notes.md").write_text("x")
    says(Files((str(corpus / "notes.md"),)), "notes.md", ".txt")
    with pytest.raises(UserError, match="did you mean 'python'"):
        Root.parse("pyton")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "nothing.txt").write_text("")
    says(Files((str(tmp_path / "nothing.txt"),)), "empty")
    says(Files((str(tmp_path),)), "empty")
    (tmp_path / "blank.txt").write_text(" \n\t\u3000\n")
    says(Files((str(tmp_path),)), "nothing but white space", "nothing to learn from")
    (tmp_path / "folder").mkdir()
    says(Files((str(tmp_path / "folder"),)), "no file in it")


@pytest.mark.parametrize("packed", PACK)
def test_invalid_utf8_is_named_with_file_and_byte_offset_and_can_be_replaced(tmp_path, packed):
    good = "é" * 700_000 + "\n"  # beyond a chunk of reading, with characters across its end
    data = b"x" + good.encode() + b"\xff tail"
    path = tmp_path / f"bad.txt{packed}"
    path.write_bytes(PACK[packed](data) if packed else data)
    says(
        Files((str(path),)),
        str(path),
        f"byte {1 + len(good.encode())} ",
        "--config.data.corpus.errors=replace",
    )
    assert read(Files((str(path),), errors="replace"))[0] == "x" + good + "\ufffd tail"


def test_a_file_that_ends_within_a_character_is_named(tmp_path):
    (tmp_path / "cut.txt").write_bytes(b"abc\xc3")
    says(Files((str(tmp_path / "cut.txt"),)), "byte 3 ")


def test_faults_in_jsonl_are_named_by_line_or_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    files = Files((str(path),))
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    says(files, str(path), "byte 27 ")
    assert read(dataclasses.replace(files, errors="replace")) == ["fine", "\ufffd"]
    path.write_bytes(b'{"text": "fine"}\n\n{"text": \n')
    says(files, "line 3", "not JSON")
    path.write_bytes(b'{"text": "fine"}\n{"body": "x"}\n')
    says(files, "line 2", "'text'")
    path.write_bytes(b'{"text": "\\ud800"}\n')
    says(files, "line 1", "surrogate")
    assert len(read(dataclasses.replace(files, errors="replace"))) == 1


def test_faults_in_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    says(Files((str(path),)), "'text'", "body")
    assert read(Files((str(path),), text_field="body")) == ["a"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"fine", b"\xff"]}), path)
    says(Files((str(path),)), "row 1", "byte 0 ")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    says(Files((str(path),)), "holds int64, not text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert read(Files((str(path),))) == ["a", "", "b"]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"a text that is no table" * 9], ids=len)
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    says(Files((str(path),)), f"{path}: can't be read: ", "Parquet")


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_a_truncated_archive_is_named(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    data = PACK[packed](random.Random(0).randbytes(5000).hex().encode())
    path.write_bytes(data[: len(data) // 2])
    says(Files((str(path),)), str(path), "can't be read")


def test_a_mixture_is_checked():
    with pytest.raises(UserError, match="parts"):
        config.check(Text(Mixture()))
    with pytest.raises(UserError, match="positive"):
        config.check(Text(Mixture((Weighted(Python(), 0.0),))))
    with pytest.raises(UserError, match="one"):
        config.check(Text(Mixture((Weighted(Mixture((Weighted(Python()),))),))))
