"""A page of results: one self-contained report.html, its figures as PNGs beside it, and the same as text.

    result = page.Page(title, question, answers, tiles, figures, tables)
    print(result)
    path = page.write(folder, result)

The page needs no network, fits a phone, and follows the reader's light or dark setting. report.py fills
one in for a sweep in N and D; an experiment with another question does so itself.
"""

import base64
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax import files
from llm_jax.scaling import style


class Table(NamedTuple):
    """Text cells under a header; `texts` are the columns that align left."""

    header: list[str]
    rows: list[list[str]]
    texts: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        pads = [str.ljust if index in self.texts else str.rjust for index in range(len(widths))]
        lines = (
            [pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)]
            for row in (self.header, *self.rows)
        )
        return "\n".join("  ".join(line).rstrip() for line in lines)


class Answer(NamedTuple):
    """What was found, in a line, and how that is known; one that isn't `good` stands out."""

    line: str
    detail: str = ""
    good: bool = True


class Tile(NamedTuple):
    """A number to see first."""

    value: str
    label: str
    detail: str = ""


class Drawing(NamedTuple):
    """A matplotlib figure with its file's name and its caption."""

    name: str
    caption: str
    figure: Any


class Fitted(NamedTuple):
    """A fit's parameters, with a line below."""

    heading: str
    table: Table
    note: str


@dataclasses.dataclass(frozen=True)
class Page:
    """All that a page tells, in its order. caution: why its numbers mean little, if they do."""

    title: str
    question: str = ""
    caution: str = ""
    tiles: Sequence[Tile] = ()
    answers: Sequence[Answer] = ()
    warnings: Sequence[str] = ()
    figures: Sequence[Drawing] = ()
    fits: Sequence[Fitted] = ()
    tables: Sequence[tuple[str, Table]] = ()
    conventions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """The page as text for a terminal."""
        parts = [self.title, self.caution]
        parts += [f"{heading}\n{table}\n{note}" for heading, table, note in self.fits]
        parts += [f"{heading}\n{table}" for heading, table in self.tables]
        parts += ["\n".join(filter(None, answer[:2])) for answer in self.answers]
        parts += ["\n".join(f"WARNING: {text}" for text in self.warnings)]
        return "\n\n".join(filter(None, parts))


def write(folder: str | pathlib.Path, page: Page) -> pathlib.Path:
    """Writes report.html and a PNG of every figure to `folder`; returns the page's path."""
    import jinja2

    folder = files.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, caption, figure in page.figures:
        (folder / f"{name}.png").write_bytes(style.png(figure))
        svg = style.svg(figure)
        drawn.append(
            {"name": name, "caption": caption, "light": _inline(svg), "dark": _inline(style.dark(svg))}
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("page.html.j2").render(page=page, figures=drawn)
    files.write_atomically(folder / "report.html", html)
    return folder / "report.html"


def show(folder: str | pathlib.Path, page: Page) -> None:
    """Writes the page to `folder`, prints it, and says where it is."""
    place = write(folder, page)
    print(f"{page}\n\nreport: {place}")


def ranged(number: Any, form: str = "") -> str:
    """An estimate with its interval, 1.23 (1.18 to 1.31), in `form` if one is given; "refused" for None."""
    if number is None:
        return "refused"
    short = style.short if abs(number.value) >= 1000 else "{:.3g}".format
    written = (lambda value: format(value, form)) if form else short
    interval = f" ({written(number.low)} to {written(number.high)})" if math.isfinite(number.low) else ""
    return f"{written(number.value)}{interval}"


def _inline(svg: bytes) -> str:
    return base64.b64encode(svg).decode()
