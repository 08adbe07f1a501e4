"""What a corpus consists of: one pass that hashes, measures and, where needed, cuts its documents.

The hashes of their texts order all documents as if at random, whatever files they came from. The first few of
this order are held out; the rest is the order of training, so that any beginning of it is
a fair and nested sample. Equal texts have equal hashes and can't stand on both sides; `Text.splits` sees
to it between the sources of a mixture.
"""

import array
import dataclasses
import hashlib
import pathlib
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import tqdm

from llm_jax.config import UserError
from llm_jax.data import readers
from llm_jax.data.cache import cache_folder, digest, once
from llm_jax.data.corpora import Corpus

LONGEST_CHARACTERS = 1 << 22  # longer documents are cut, which bounds memory
FEWEST_DOCUMENTS = 20  # of fewer, all are cut, so that some can be held out
_PIECES = 200


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """hashes: uint64 [documents]; sizes_bytes: int64 [documents], in the order of reading."""

    hashes: np.ndarray
    sizes_bytes: np.ndarray
    longest: int  # characters that a document is cut to
    uncut: int  # documents before cutting

    @property
    def content(self) -> str:
        """A hash of all documents, in whatever order and from whatever files they come."""
        return digest(np.sort(self.hashes).astype("<u8").tobytes())


def texts(corpus: Corpus, longest: int) -> Iterator[tuple[int, str]]:
    """(number of the document, text): the corpus's documents without the empty ones, cut to `longest`."""
    for number, document in enumerate(corpus.documents()):
        for text in readers.cut(document, longest):
            yield number, text


def catalogue(corpus: Corpus) -> Catalogue:
    """The corpus's catalogue, cached as long as `corpus.stamp()` stays the same.

    Raises UserError for a corpus that is missing, empty, damaged or not UTF-8.
    """
    path = cache_folder() / "catalogues" / f"{digest([1, corpus.stamp()])}.npz"

    def build(partial: pathlib.Path) -> None:
        found = _scan(corpus, LONGEST_CHARACTERS)
        if found.uncut < FEWEST_DOCUMENTS:
            total = int(found.sizes_bytes.sum())
            found = _scan(corpus, min(max(total // _PIECES, 1 << 8), 1 << 16))
        with open(partial, "wb") as file:
            np.savez(file, **dataclasses.asdict(found))

    once(path, build)
    try:
        return _load(path)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        print(f"{path} is damaged: it is made anew", file=sys.stderr)
        path.unlink(missing_ok=True)
        return _load(once(path, build))


def _load(path: pathlib.Path) -> Catalogue:
    with np.load(path) as arrays:
        return Catalogue(
            arrays["hashes"], arrays["sizes_bytes"], int(arrays["longest"]), int(arrays["uncut"])
        )


def hash_of(data: bytes) -> int:
    """The hash that orders a document among others, and by which its text is known again."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _scan(corpus: Corpus, longest: int) -> Catalogue:
    hashes, sizes, uncut, latest, blank = array.array("Q"), array.array("q"), 0, -1, True
    with progress("reading " + corpus.name) as bar:
        for number, text in texts(corpus, longest):
            data = text.encode()
            hashes.append(hash_of(data))
            sizes.append(len(data))
            uncut, latest, blank = uncut + (number != latest), number, blank and text.isspace()
            bar.update(len(data))
    if blank:
        what = "has nothing but white space" if hashes else "is empty"
        raise UserError(
            f"the corpus {corpus.name} {what}: there is nothing to learn from; name files with text"
        )
    return Catalogue(np.array(hashes, np.uint64), np.array(sizes, np.int64), longest, uncut)


def split(
    hashes: np.ndarray, sizes_bytes: np.ndarray, fraction: float, most_bytes: int, name: str
) -> list[np.ndarray]:
    """[held-out, training] numbers of documents in the order of their hashes.

    Held out are the first `fraction` of the documents, as far as they have `most_bytes`, one at least.
    Raises UserError where nothing would be left to train on of the corpus `name`.
    """
    order = np.argsort(hashes, kind="stable")
    if fraction == 0:
        return [order[:0], order]
    within = int(np.searchsorted(np.cumsum(sizes_bytes[order]), most_bytes, side="right"))
    count = max(1, min(int(fraction * len(order)), within))
    count = int(np.searchsorted(hashes[order], hashes[order[count - 1]], side="right"))
    if count == len(order):
        copies = "one document" if count == 1 else f"{count:,} copies of one document"
        raise UserError(
            f"the corpus {name} has only {copies} of {sizes_bytes[0]:,} bytes, so none can be held out to be "
            "scored; give it more text, or score nothing by --config.data.held_out_fraction=0"
        )
    return [order[:count], order[count:]]


def sample(corpus: Corpus, found: Catalogue, training: np.ndarray, most_bytes: int) -> Iterator[str]:
    """About `most_bytes` of the training documents: the first in their order, and in that order.

    They are held in memory together, since what is trained on them may depend on their order (unigram's
    vocabulary does), which must not be that of the files.
    """
    chosen = training[: int(np.searchsorted(np.cumsum(found.sizes_bytes[training]), most_bytes)) + 1]
    places = np.full(len(found.hashes), len(chosen))
    places[chosen] = np.arange(len(chosen))
    read = zip(places, texts(corpus, found.longest), strict=False)
    yield from (text for _, text in sorted((place, text) for place, (_, text) in read if place < len(chosen)))


def progress(what: str, total: int | None = None, done: int = 0) -> tqdm.tqdm:
    """A bar on stderr, in bytes; it shows itself only for work that takes longer than a second."""
    return tqdm.tqdm(
        desc=what, total=total, initial=done, unit="B", unit_scale=True, delay=1, file=sys.stderr, leave=False
    )
