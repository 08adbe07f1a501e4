"""Tables from files: CSV (commas, semicolons or tabs), Parquet and JSON, told apart by what they hold.

What a file is not is said in a line that names what it is; what was understood rather than read literally
(a separator, say) is kept in `frame.attrs["notes"]`.
"""

import csv
import json
import math
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import files
from llm_jax.config import UserError, nearest

KINDS = ".csv (commas, semicolons or tabs), .parquet, .json or .jsonl (a list of runs)"
_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".json", ".jsonl")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MISSING = {"", "nan", "na", "n/a", "null", "none"}
_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "an Excel workbook or a ZIP archive (save the sheet as CSV)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (save the sheet as CSV)",
    b"\x1f\x8b": "compressed by gzip (unpack it first)",
    b"\xff\xfe": "text in UTF-16 (save it as UTF-8)",
}


def read_points(path: str | pathlib.Path) -> pd.DataFrame:
    """The table at `path`; a row's label is its line in a CSV or a .jsonl, its number in the others.

    Raises UserError where there is no such file, it is no table, or it has no rows.
    """
    path = files.path(path)
    if not path.is_file():
        what = "a folder, not a table" if path.is_dir() else "no such file"
        folder = path if path.is_dir() else path.parent
        near = [str(p) for p in sorted(folder.glob("*")) if p.suffix in _SUFFIXES and p.is_file()]
        hint = nearest(str(path), near) if near else f"tables are {KINDS}"
        if len(near) > 20 and not hint.startswith("did you mean "):
            hint = nearest("", near[:20])
        raise UserError(f"no table at {str(path)!r}: {what}; {hint}")
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        frame = _parquet(path)
    elif (
        kind := next((text for magic, text in _MAGIC.items() if head.startswith(magic)), None)
    ) or b"\0" in head:
        raise UserError(f"{path} is {kind or 'a binary file'}, no table; tables are {KINDS}")
    elif path.suffix == ".parquet" and head:
        raise UserError(f"{path} is no Parquet file, whatever its name says; tables are {KINDS}")
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(
                f"{path} is no UTF-8 text ({error.__class__.__name__}); tables are {KINDS}"
            ) from None
        frame = _json(path, text) if path.suffix in (".json", ".jsonl") else _csv(path, text)
    if not len(frame):
        raise UserError(f"{path}: the table has no rows")
    return frame


def _parquet(path: pathlib.Path) -> pd.DataFrame:
    try:
        with path.open("rb") as file:
            return pd.read_parquet(file)
    except (ValueError, OSError):
        raise UserError(
            f"{path} begins as a Parquet file but can't be read: it is damaged or cut off"
        ) from None


def _json(path: pathlib.Path, text: str) -> pd.DataFrame:
    """A list of objects, an object of columns of one length, or an object a line."""
    if path.suffix == ".jsonl":
        lines = {number: line for number, line in enumerate(text.splitlines(), 1) if line.strip()}
        runs = [_parsed(path, line, f"line {number}: ") for number, line in lines.items()]
        index = pd.Index(list(lines), name="line")
    else:
        runs, index = _parsed(path, text, ""), None
        if isinstance(runs, dict):
            columns = [_numbered(column) for column in runs.values()]
            if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
                runs = [dict(zip(runs, row, strict=True)) for row in zip(*columns, strict=True)]
    if not (isinstance(runs, list) and all(isinstance(run, dict) for run in runs)):
        held = (
            f"an object of {', '.join(map(repr, list(runs)[:4]))}"
            if isinstance(runs, dict)
            else "something else"
        )
        raise UserError(
            f'{path} holds {held}, not a list of runs such as [{{"N": 1e9, "D": 2e10, "loss": 2.4}}]'
        )
    return pd.DataFrame(runs, index=index)


def _numbered(column: Any) -> Any:
    """pandas writes a column as {"0": first, "1": second ...}."""
    if isinstance(column, dict) and list(column) == [str(i) for i in range(len(column))]:
        return list(column.values())
    return column


def _parsed(path: pathlib.Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {place}not JSON ({getattr(error, 'msg', 'unreadable')})") from None


def _csv(path: pathlib.Path, text: str) -> pd.DataFrame:
    """Rows of cells under a header; the separator is the one that the header shows."""
    lines = text.splitlines()
    header = next((line for line in lines if line.strip()), "")
    found = [separator for separator in _SEPARATORS if separator in header]
    if len(found) > 1:
        both = " and ".join(_SEPARATORS[separator] for separator in found)
        raise UserError(
            f"{path}: the header has both {both}; which of them separates the columns can't be told"
        )
    separator = found[0] if found else ","
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        rows, before = [], 0
        for row in reader:
            if reader.line_num > before + 1:
                raise UserError(f"{path}: line {before + 1} opens a quote that it doesn't close")
            before = reader.line_num
            rows.append((before, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not a line of a CSV ({error})") from None
    rows = [(number, row) for number, row in rows if any(row)]
    names = rows[0][1] if rows else []
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise UserError(
                f"{path}: line {number} has {len(row)} cells, the header {len(names)} ({header.strip()})"
            )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: the header has the column {repeated[0]!r} twice")
    index = pd.Index([number for number, _ in rows[1:]], name="line")
    columns = zip(*(row for _, row in rows[1:]), strict=True)
    frame = pd.DataFrame(dict(zip(names, map(_typed, columns), strict=False)), index=index)
    if separator != ",":
        frame.attrs["notes"] = (f"columns are separated by {_SEPARATORS[separator]}",)
    return frame


def _typed(cells: tuple[str, ...]) -> np.ndarray:
    """Numbers where all cells are numbers or missing, true and false likewise, else texts."""
    filled = [None if cell.lower() in _MISSING else cell for cell in cells]
    try:
        return np.array([np.nan if cell is None else float(cell) for cell in filled])
    except ValueError:
        pass
    if {cell and cell.lower() for cell in filled} <= {"true", "false"}:
        return np.array([cell.lower() == "true" for cell in filled])
    return np.array(filled, dtype=object)


# ---- flags ----


def pairs(text: str, flag: str) -> dict[str, str]:
    """{"N": "params"} from N=params,D=tokens."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"--{flag}={text}: write NAME=VALUE, separated by commas")
    return {name.strip(): value.strip() for name, _, value in pairs}


def numbers(text: str, flag: str) -> dict[str, float]:
    """{"N": 1e9} from N=1e9; predictions are asked at positive numbers."""
    numbers = {}
    for name, value in pairs(text, flag).items():
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]) or (flag == "predict" and numbers[name] <= 0):
            raise UserError(f"--{flag}={text}: {value!r} is not a {'positive ' * (flag == 'predict')}number")
        if flag == "predict" and not 1e-6 <= numbers[name] <= 1e60:
            raise UserError(f"--predict={text}: no run has a {name} of {value}")
    return numbers
