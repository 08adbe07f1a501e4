"""Text files as streams of documents: .txt, .jsonl and .parquet, plain or packed by gzip, xz or zstd.

A document is an iterable of chunks of text, so that one huge file is never held in memory.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from llm_jax.config import UserError, nearest

FORMATS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".xz", ".zst")
RECORDS = (".jsonl", ".json", ".parquet")
REPLACE = "--config.data.corpus.errors=replace"
FIELD = "--config.data.corpus.text_field=NAME names another"
_CHUNK_BYTES = 1 << 20


def form(path: pathlib.Path) -> str | None:
    """Which of FORMATS the file is by its name, packed or not; None for any other file."""
    name = path.stem if path.suffix in PACKED else path.name
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read(path: pathlib.Path, suffix: str, text_field: str, errors: str) -> Iterator[Iterable[str]]:
    """The documents of one file: a whole .txt, each line of .jsonl, each row of .parquet.

    errors: "strict" raises UserError that names the file and the byte (of the unpacked file) that is not
    UTF-8; "replace" puts U+FFFD in its place. Raises UserError for damaged files too.
    """

    def documents() -> Iterator[Iterable[str]]:
        with _open(path) as file:
            yield from _READERS[suffix](path, file, text_field, errors)

    for document in _readable(path, documents()):
        yield _readable(path, document)


def whole(path: pathlib.Path) -> str:
    """The text of a file, packed or not; raises UserError for one that is missing, damaged or not UTF-8."""
    return "".join(lines(path))


def unpacked(path: pathlib.Path) -> bytes:
    """What is in a file, whatever it is packed by."""

    def chunks() -> Iterator[bytes]:
        with _open(path) as file:
            yield file.read()

    return b"".join(_readable(path, chunks()))


def lines(path: pathlib.Path) -> Iterator[str]:
    """Its lines, each with its end."""

    def texts() -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(file):
                yield line.decode("utf-8" if number else "utf-8-sig")

    return _readable(path, texts())


def rows(path: pathlib.Path) -> Iterator[dict]:
    """The rows of a .parquet file, packed or not."""

    def records() -> Iterator[dict]:
        import pyarrow.parquet

        with _open(path) as file, tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            for batch in pyarrow.parquet.ParquetFile(unpacked).iter_batches(batch_size=64):
                yield from batch.to_pylist()

    return _readable(path, records())


def records(
    path: pathlib.Path,
    what: str,
    more: Sequence[str] = (),
    within: str = "",
    alone: Callable[[Any], Any] = lambda value: False,
) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of all records of a file: .jsonl, .json or .parquet, packed or not.

    A .json file has a list of records, or an object of them, or one whose field `within` has, or one record,
    which `alone` tells. more: ".csv" and ".txt" (one record with the field text), where `what` stands in
    such too.
    """
    name = path.stem if path.suffix in PACKED else path.name
    suffix = next((suffix for suffix in (*RECORDS, *more) if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: {what} are in files that end in {', '.join((*RECORDS, *more))}")
    if suffix == ".parquet":
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows(path)))
    elif suffix == ".txt":
        yield str(path), {"text": whole(path)}
    elif suffix == ".csv":
        table = csv.DictReader(io.StringIO(whole(path), newline=""), strict=True)
        try:
            yield from ((f"{path}: line {table.line_num}", row) for row in table)
        except csv.Error as error:
            raise UserError(f"{path}: line {table.line_num} is not CSV: {error}") from None
    elif suffix == ".jsonl":
        for number, text in enumerate(lines(path), 1):
            if text.strip():
                yield f"{path}: line {number}", _json(text, f"{path}: line {number}")
    else:
        value = _json(whole(path), str(path))
        if alone(value):
            return (yield str(path), value)
        value = value.get(within, value) if within and isinstance(value, dict) else value
        if not isinstance(value, list | dict):
            raise UserError(f"{path}: neither a list of records nor an object of them")
        items = value if isinstance(value, list) else value.values()
        yield from ((f"{path}: record {index}", item) for index, item in enumerate(items))


def cut(chunks: Iterable[str], longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters: cut at line ends, else before spaces, else anywhere."""
    held = ""
    for chunk in chunks:
        held, start = held + chunk, 0
        while len(held) - start > longest:
            end = start + longest
            stop = held.rfind("\n", start, end) + 1 or max(held.rfind(" ", start + 1, end), 0) or end
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def near(name: str, names: Sequence[str] | Mapping, otherwise: str) -> str:
    """`config.nearest` where the names are too many to list: `otherwise` stands for the list."""
    hint = nearest(name, names)
    return hint if hint.startswith("did you mean ") else otherwise


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}") from None


def _open(path: pathlib.Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _readable(path: pathlib.Path, items: Iterable) -> Iterator:
    """`items`, with what the libraries raise for a missing or damaged file turned into a UserError."""
    try:
        yield from items
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: can't be read: {error or type(error).__name__}") from error


def _text(path: pathlib.Path, file: BinaryIO, text_field: str, errors: str) -> Iterator[Iterable[str]]:
    def chunks() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        offset, last = 0, False
        while not last:
            data = file.read(_CHUNK_BYTES)
            last = not data
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data, last)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start) from None
            offset += len(data)

    yield chunks()


def _lines(path: pathlib.Path, file: BinaryIO, text_field: str, errors: str) -> Iterator[Iterable[str]]:
    offset = 0
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line.decode("utf-8", errors)) if line.strip() else {text_field: ""}
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}: line {number} has no text in the field {text_field!r}; {FIELD}")
        yield (_sound(text, f"{path}: line {number}", errors),)
        offset += len(line)


def _table(path: pathlib.Path, file: BinaryIO, text_field: str, errors: str) -> Iterator[Iterable[str]]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if path.suffix in PACKED:  # a table is read from its end, which a packed file can't do quickly
            shutil.copyfileobj(file, unpacked)
            file = unpacked
        table = pyarrow.parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_field!r}; there are: {', '.join(table.schema_arrow.names)}; {FIELD}"
            )
        kind = table.schema_arrow.field(text_field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(word in str(kind) for word in ("string", "binary")):
            raise UserError(f"{path}: the column {text_field!r} holds {kind}, not text; {FIELD}")
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=[text_field]):
            for value in batch.column(0).cast(kind).cast(pyarrow.large_binary()):
                try:
                    yield ((value.as_py() or b"").decode("utf-8", errors),)
                except UnicodeDecodeError as error:
                    raise _not_utf8(f"{path}: row {row}", error.start) from None
                row += 1


def _sound(text: str, place: str, errors: str) -> str:
    """JSON can spell half a surrogate pair, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise UserError(
                f"{place}: character {error.start} is half a surrogate; {REPLACE} replaces it"
            ) from None
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


def _not_utf8(place: object, offset: int) -> UserError:
    return UserError(f"{place}: byte {offset} is not UTF-8; {REPLACE} replaces such bytes")


_READERS = {".txt": _text, ".jsonl": _lines, ".parquet": _table}
