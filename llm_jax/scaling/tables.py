"""Tables of points: filtered by an expression, and checked before any law is fitted to them.

A table has one row a run and the columns a law needs: N [parameters], D [tokens], C [FLOPs], loss
[nats/token]. Whatever else stands in it may be used by a filter. What can't be fitted is refused with its
line; runs that diverged are left out, and said so.
"""

import ast
import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest

# A cell beyond these is a slip, not a measurement.
LIMITS = {"C": 1e60, "budget_flops": 1e60, "loss": 1e6, "error": 1e3}
_LIMIT = 1e30  # of any other column
DONE = ("done", "finished", "completed", "success")  # what trackers call a run that reached its end


class Excluded(NamedTuple):
    """A run that was left out, and why."""

    run: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Points:
    """A checked table: every cell of `needs` is a positive finite number and no point stands twice.

    weights [n]: of mean 1 unless all are alike. clusters [n]: the number of the run that a row belongs to.
    """

    frame: pd.DataFrame
    weights: np.ndarray
    clusters: np.ndarray
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """How many runs the rows are of."""
        return int(self.clusters.max()) + 1


class SeedNoise(NamedTuple):
    """Standard deviation of ln loss between seeds of one configuration, pooled; its degrees of freedom."""

    deviation: float
    freedom: int


def between_seeds(log_loss: pd.Series, by: Sequence[pd.Series]) -> SeedNoise:
    """Of runs that are alike in every column of `by`; (0, 0) where none was repeated."""
    groups = log_loss.groupby(list(by))
    spare = groups.size() - 1
    freedom = int(spare.sum())
    return SeedNoise(float(np.sqrt((spare * groups.var().fillna(0)).sum() / max(freedom, 1))), freedom)


def check_points(
    frame: pd.DataFrame,
    needs: Sequence[str],
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    weights: str | None = None,
    flops_per_nd: float = 6.0,
    curves: bool = False,
) -> Points:
    """The rows of `frame` that can be fitted, with `needs` (inputs, then what is predicted) and the rest as
    columns.

    columns: {"N": "params"} reads N from the column params, {"D": "tokens_in_billions*1e9"} from an
    expression of columns. where: an expression such as "D > 20*N and width < 512". weights: an expression
    such as "1/std**2". A missing C is flops_per_nd N D, a missing M is D/N. A run whose status is none of
    DONE is left out. curves: the rows are training curves, many of one run, told apart by a column run (or
    name).
    Raises UserError for a missing column, a cell that is no positive number, and a repeated point.
    """
    frame = frame.copy() if frame.index.is_unique else frame.reset_index(drop=True)
    given = frame.copy()  # columns may swap names; expressions see the new ones
    for name, source in (columns or {}).items():
        slip = next((need for need in needs if need.lower() == name.lower() and need != name), None)
        if slip:
            raise UserError(f"--columns={name}={source}: the name is {slip}, not {name}")
        if source not in given and any(sign in source for sign in "+-*/`"):
            frame[name] = evaluate("columns", source, frame)
        else:
            frame[name] = _column(given, source, f"the column for {name}")
    excluded, notes = [], list(frame.attrs.get("notes", ()))
    for name in needs:
        if name not in frame and (source := _like(frame, name)):
            notes.append(f"the column {source!r} is read as {name}")
            frame = frame.rename(columns={source: name})
    if "status" in frame:
        done = frame["status"].astype(str).str.lower().isin(DONE)
        for label in frame.index[~done]:
            excluded.append(Excluded(name_of(frame, label), f"status {frame.at[label, 'status']}"))
        frame = frame[done].copy()
    notes += _derived(frame, needs, flops_per_nd)
    for name in needs:
        other = {"N": "D", "D": "N"}.get(name)
        hint = f" or --columns={name}=C/{flops_per_nd:g}/{other}" if {other, "C"} <= set(frame) else ""
        _column(frame, name, f"the column {name}", f"; name yours with --columns={name}=YOURS{hint}")
    if where:
        kept = filter_rows(frame, where)
        notes.append(f"{int(kept.sum())} of {len(frame)} runs are where {where}")
        frame = frame[kept]
    if not len(frame):
        why = (
            f" where {where}"
            if where
            else f": the status of all {len(excluded)} is none of {', '.join(DONE)}"
        )
        raise UserError(f"no runs are left to fit{why}")
    for name in (*needs, "budget_flops") if "C" in needs and "budget_flops" in frame else needs:
        frame[name] = _numbers(frame, name)
    # Of points a name may be that of a size; of training curves it says whose they are.
    run = next((name for name in (("run", "name") if curves else ("run",)) if name in frame), None)
    if curves and run is None:
        raise UserError("training curves need a column run that says which run a row belongs to")
    if not curves:
        _refuse_repeats(frame, list(needs[:-1]))
    numbers = pd.factorize(frame[run])[0] if run else np.arange(len(frame))
    if (nameless := numbers < 0).any():
        if curves:
            line = frame.index[nameless][0]
            raise UserError(f"row {line} has no {run}, which says whose training curve it belongs to")
        numbers[nameless] = numbers.max() + 1 + np.arange(nameless.sum())  # each by itself
    if not curves and (runs := int(numbers.max()) + 1) < len(frame):
        notes.append(f"{len(frame)} rows are of {runs} runs, by the column run; intervals draw whole runs")
    return Points(frame, _weights(frame, weights), numbers, tuple(excluded), tuple(notes))


def _derived(frame: pd.DataFrame, needs: Sequence[str], flops_per_nd: float) -> list[str]:
    """Adds C and M to `frame` where they are needed and N and D are there; returns a note of each.

    Cells are checked later, those of rows that --where leaves out never.
    """
    if not {"N", "D"} <= set(frame):
        return []
    N, D = (pd.to_numeric(frame[name], errors="coerce").astype(float) for name in "ND")
    notes = []
    with np.errstate(all="ignore"):
        rules = (("C", flops_per_nd * N * D, f"{flops_per_nd:g} N D"), ("M", D / N, "D / N"))
    for name, value, text in rules:
        if name in needs and name not in frame:
            notes.append(f"no column {name}: it is {text}")
            frame[name] = value
    return notes


def _weights(frame: pd.DataFrame, expression: str | None) -> np.ndarray:
    """The weight of every row, of mean 1; UserError where one is no positive number."""
    if not expression:
        return np.ones(len(frame))
    values = np.broadcast_to(np.asarray(evaluate("weights", expression, frame)), len(frame))
    if values.dtype.kind not in "if" or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"--weights={expression!r}: weights are positive numbers in every row")
    return values / values.mean()


def filter_rows(frame: pd.DataFrame, expression: str) -> np.ndarray:
    """True for the rows where `expression` holds: columns, numbers, texts, + - * / **, < <= ==, and or not.

    The expression is walked, never run as Python; UserError names what it doesn't know.
    """
    kept = np.broadcast_to(np.asarray(evaluate("where", expression, frame)), len(frame))
    if kept.dtype != bool:
        raise UserError(f"--where={expression!r} is a number, not a condition such as 'D > 20*N'")
    return kept


def evaluate(flag: str, expression: str, frame: pd.DataFrame) -> Any:
    """What `expression` of the columns of `frame` comes to; `flag` is named where it makes no sense.

    A name with blanks or brackets stands in backticks, as in pandas: `final loss` < 3.
    """
    quoted: dict[str, str] = {}

    def plain(found: re.Match) -> str:
        return quoted.setdefault(found[1], f"_quoted_{len(quoted)}_")

    text = re.sub("`([^`]*)`", plain, expression)
    odd = next((name for name in map(str, frame) if not name.isidentifier() and name in text), None)
    hint = f"; the column stands in backticks: `{odd}`" if odd else ""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        example = hint or ", such as 'D > 20*N and width < 512'"
        raise UserError(f"--{flag}={expression!r} is no expression{example}") from None
    try:
        columns = {new: _column(frame, name, "an expression") for name, new in quoted.items()}
        with np.errstate(all="ignore"):  # the caller refuses what is no number
            return _evaluate(tree, frame.assign(**columns))
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    except TypeError:
        raise UserError(f"--{flag}={expression!r} puts a number and a text together") from None
    except (ArithmeticError, RecursionError):
        raise UserError(f"--{flag}={expression!r} comes to no number") from None


_binary = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_joins = {ast.And: np.logical_and, ast.Or: np.logical_or}
_unary = {ast.Not: np.logical_not, ast.USub: operator.neg}


def _evaluate(node: ast.AST, frame: pd.DataFrame) -> Any:
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return float(value)  # 9**9**9 then ends at once
        case ast.Name(id=name):
            return _column(frame, name, "an expression")
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _unary:
            return _unary[type(op)](_evaluate(operand, frame))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _binary:
            return _binary[type(op)](_evaluate(left, frame), _evaluate(right, frame))
        case ast.BoolOp(op=op, values=values):
            return _joins[type(op)].reduce([_evaluate(value, frame) for value in values])
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _binary for op in ops):
            sides = [_evaluate(side, frame) for side in (left, *rest)]
            pairs = zip(ops, sides[:-1], sides[1:], strict=True)
            return np.logical_and.reduce([np.asarray(_binary[type(op)](a, b)) for op, a, b in pairs])
    raise UserError(
        f"in an expression {ast.unparse(node)!r} is neither column, number, text, comparison, and, or, not"
    )


def _column(frame: pd.DataFrame, name: str, what: str, hint: str = "") -> np.ndarray:
    if name not in frame:
        raise UserError(f"{what}: no column {name!r}; {nearest(name, [str(c) for c in frame])}{hint}")
    return frame[name].to_numpy()


def _like(frame: pd.DataFrame, name: str) -> str | None:
    """The one column that differs from `name` by case and blanks alone; UserError where there are several."""
    near = [column for column in map(str, frame) if column.strip().lower() == name.lower()]
    if len(near) > 1:
        both = " and ".join(map(repr, near))
        raise UserError(f"the columns {both} could each be {name}; say which by --columns={name}={near[0]}")
    return near[0] if near else None


def name_of(frame: pd.DataFrame, label: Any) -> str:
    """How a message calls a row: its name, or its line."""
    return str(frame.at[label, "name"]) if "name" in frame else f"{frame.index.name or 'row'} {label}"


def with_compute(frame: pd.DataFrame, flops_per_nd: float) -> pd.DataFrame:
    """The table with C = flops_per_nd N D where it has neither C nor budgets but N and D."""
    if "C" in frame or not {"N", "D"} <= set(frame):
        return frame
    return frame.assign(C=flops_per_nd * frame["N"].astype(float) * frame["D"].astype(float))


def listed(what: str, frame: pd.DataFrame, labels: pd.Index, by: pd.Series) -> str:
    """The rows `labels` by name, each with its share `by`, five at most; "" if there are none."""
    named = [f"{name_of(frame, label)} ({by[label]:+.0%})" for label in labels[:5]]
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return f"{what}{': ' * bool(what)}{', '.join(named)}{more}" if named else ""


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    """The column as float64, each cell positive and finite and of a possible size."""
    column = pd.to_numeric(frame[name], errors="coerce").astype(float)
    for label, value in column[~((column > 0) & (column <= LIMITS.get(name, _LIMIT)))].items():
        place = f"{frame.index.name or 'row'} {label}: {name}"
        cell = frame.at[label, name]
        if pd.isna(cell):
            raise UserError(f"{place} is missing (NaN); fill the cell or leave the row out with --where")
        if np.isnan(value):
            comma = "; decimals are written with a point" if isinstance(cell, str) and "," in cell else ""
            raise UserError(f"{place} is {cell!r}, not a number{comma}")
        if value > 0:
            raise UserError(
                f"{place} is {value:g}; nothing above {LIMITS.get(name, _LIMIT):g} is a measurement"
            )
        raise UserError(f"{place} is {value:g}; it must be positive")
    return column


def _refuse_repeats(frame: pd.DataFrame, inputs: list[str]) -> None:
    """Repeats are fine as seeds; otherwise the same run would count twice."""
    keys = inputs + (["seed"] if "seed" in frame else [])
    repeated = frame.duplicated(keys, keep=False)
    if repeated.any():
        first = frame.index[repeated][0]
        same = frame.index[(frame[keys] == frame.loc[first, keys]).all(axis=1)]
        point = ", ".join(f"{key}={frame.at[first, key]:g}" for key in inputs)
        lines = " and ".join(f"{label}" for label in same[:3])
        best = "keep the best at each (as optima.csv of --approach=2 --out=DIR has)"
        raise UserError(
            f"{frame.index.name or 'row'}s {lines} repeat the point {point}; "
            f"{best if inputs == ['C'] else 'keep one'}, or tell them apart by a column seed"
        )
