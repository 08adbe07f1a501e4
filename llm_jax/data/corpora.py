"""Corpora: where documents come from. A corpus is a stream of texts in a fixed order."""

import dataclasses
import functools
import glob
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from llm_jax.config import Tagged, UserError, outside_identity, to_json
from llm_jax.data import readers


class Corpus(Tagged):
    """Root of the corpora. A file, a folder or a pattern on the command line stands for `files`."""

    @classmethod
    def parse(cls, text: str) -> "Corpus":
        """A kind by its name, else text files; raises UserError with the nearest of both."""
        if text in cls.members:
            return cls.members[text]()
        if not any(mark in text for mark in "*?[/.") and not os.path.exists(text):
            otherwise = f"there are: {', '.join(cls.members)}, or a path"
            hint = readers.near(text, [*cls.members, *os.listdir()], otherwise)
            raise UserError(f"no corpus {text!r}; {hint}")
        return Files(paths=(text,))

    @classmethod
    def choices(cls) -> list[str]:
        return [*cls.members, "a file, folder or pattern"]

    def documents(self) -> Iterator[Iterable[str]]:
        """The documents in a fixed order, each as an iterable of chunks of text."""
        raise NotImplementedError

    def stamp(self) -> Any:
        """A JSON value, cheap to get, that changes where the documents may have changed."""
        return to_json(self)

    def sources(self) -> "tuple[Weighted, ...]":
        """What rows are drawn from, with their weights: only a mixture has more than itself."""
        return (Weighted(self),)

    @property
    def name(self) -> str:
        """What the corpus is called in records."""
        return self.kind


@dataclasses.dataclass(frozen=True)
class Python(Corpus, kind="python"):
    """The source of the running interpreter's standard library (about 12 MB): needs no download.

    Its tests and files written at build time are left out; each module is a document. packages: with the
    source of all installed packages (130 to 190 MB here, by extras), but this one's.
    """

    packages: bool = False

    def _paths(self) -> list[pathlib.Path]:
        roots = {sysconfig.get_path("stdlib")}
        if self.packages:
            roots |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "llm_jax"}
        written = ("_sysconfigdata", "sitecustomize", "__editable__")  # by whoever installs, with paths
        paths = []
        for root in roots:
            for folder, subfolders, names in os.walk(root):
                subfolders[:] = [
                    name for name in subfolders if name not in skip and not name.startswith("config-")
                ]
                paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(path for path in paths if not path.name.startswith(written))

    def documents(self) -> Iterator[Iterable[str]]:
        for path in self._paths():
            yield from readers.read(path, ".txt", "", "replace")

    def stamp(self) -> Any:
        return {"kind": self.kind, "files": _installed(self)}


@dataclasses.dataclass(frozen=True)
class Files(Corpus, kind="files"):
    """Your own texts: files, folders (searched in depth) and patterns of .txt, .jsonl and .parquet.

    Each may be packed (.gz, .xz, .zst). A .txt file is one document, a line of .jsonl or a row of .parquet
    another. Nothing here decides a result but the documents themselves, which enter by their hash.
    """

    paths: tuple[str, ...] = outside_identity(())
    text_field: str = outside_identity("text")
    errors: Literal["strict", "replace"] = outside_identity("strict")  # what to do with invalid UTF-8

    def validate(self) -> None:
        if not self.paths:
            raise UserError(
                "data.corpus.paths is (); name texts, for example --config.data.corpus=path/*.txt"
            )

    def _paths(self) -> list[pathlib.Path]:
        self.validate()
        found: list[pathlib.Path] = []
        for text in self.paths:
            text = os.path.expanduser(text)
            if os.path.isdir(text):
                inside = (path for path in pathlib.Path(text).rglob("*") if path.is_file())
                matches = [path for path in inside if readers.form(path)]
            else:
                names = [text] if os.path.exists(text) else glob.glob(text, recursive=True)
                matches = [pathlib.Path(name) for name in names if os.path.isfile(name)]
            if not matches:
                raise UserError(_missing(text))
            found += matches
        return sorted(set(found))

    def documents(self) -> Iterator[Iterable[str]]:
        for path in self._paths():
            yield from readers.read(path, _form(path), self.text_field, self.errors)

    def stamp(self) -> Any:
        return {"kind": self.kind, "read": [self.text_field, self.errors], "files": _facts(self._paths())}

    @property
    def name(self) -> str:
        return ",".join(self.paths)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """One source of a mixture: its share of the rows, and how many of its tokens may be used."""

    corpus: Corpus
    weight: float = 1.0
    unique_tokens: int | None = None

    def validate(self) -> None:
        if not self.weight > 0:
            raise UserError(f"data.corpus.parts: a weight is {self.weight}; each is a positive number")


@dataclasses.dataclass(frozen=True)
class Mixture(Corpus, kind="mixture"):
    """Several corpora, each giving its share of the rows (rounded to thousandths, see batches.py)."""

    parts: tuple[Weighted, ...] = ()

    def validate(self) -> None:
        if not self.parts:
            raise UserError(
                "data.corpus.parts is (); an experiment file names the parts of a mixture: "
                "corpus=Mixture((Weighted(...), ...))"
            )
        if any(isinstance(part.corpus, Mixture) for part in self.parts):
            raise UserError("data.corpus.parts: a mixture can't contain a mixture; list all corpora in one")

    def sources(self) -> tuple[Weighted, ...]:
        self.validate()
        return self.parts


@functools.cache
def _installed(corpus: Python) -> list[tuple[str, int, int]]:
    """Looked at once in a process: every run's identity asks, and an interpreter's files stay as they are."""
    return _facts(corpus._paths())


def _form(path: pathlib.Path) -> str:
    suffix = readers.form(path)
    if suffix is None:
        known, packed = ", ".join(readers.FORMATS), ", ".join(readers.PACKED)
        raise UserError(f"{path}: a corpus file ends in {known} (packed: and then in {packed})")
    return suffix


def _facts(paths: list[pathlib.Path]) -> list[tuple[str, int, int]]:
    facts = [(path, path.stat()) for path in paths]
    return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in facts]


def _missing(text: str) -> str:
    """What to say of a path or pattern that matches nothing: the nearest that exists."""
    path = pathlib.Path(text)
    parent = path.parent
    while not parent.is_dir():  # the first folder on the way that exists
        path, parent = parent, parent.parent
    if os.path.isdir(text):
        return f"no corpus in {text!r}: no file in it ends in {', '.join(readers.FORMATS)}"
    names = [str(found) for found in sorted(parent.iterdir()) if found.is_dir() or readers.form(found)]
    hint = readers.near(str(path), names, f"nothing like it in {str(parent)!r}")
    return f"no corpus at {text!r}; {hint}"
