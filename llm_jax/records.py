"""Records: what a run leaves on disk for analysis, and how it is read. Nothing else is.

    config.json                 identity, config and where the run stands; written once, by the first start
    metrics/00000.jsonl ...     numbered parts (parts.py), one JSON row a step; a new one at each start, which
                                says from which step it goes on, and of which run's state if not of its own
    result.json                 written last and atomically: a run is complete exactly if it stands
    tensorboard/                the metrics once more, as TensorBoard events
    checkpoints/                see checkpoints.py
    claims/                     which process writes here, and that it lives: see claims.py

The folder may be one of a disk or of a bucket (files.path). A row of step s is what is known when s steps
are done: log it before the checkpoint of step s is saved, and a killed run loses no row. Numbers that aren't
finite are written as files.py says, and read back here.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax import claims, files
from llm_jax.config import UserError
from llm_jax.environment import environment
from llm_jax.events import Events, WandB
from llm_jax.files import dumps, parsed, plain, write_atomically
from llm_jax.parts import Parts

if TYPE_CHECKING:
    import pandas


class Record:
    """The writing side of one run's folder: start, resume_at, log ..., finish (or close).

    One process writes in a folder at a time. Of a run's many processes that is number 0; in the others
    (`writes` False) nothing is done. As a context it closes itself, whatever happens.
    wandb: the project at Weights & Biases that is told too.
    """

    def __init__(
        self,
        folder: str | Path,
        writes: bool = True,
        rows_per_part: int = 10_000,
        tensorboard: bool = True,
        wandb: str = "",
    ) -> None:
        self.folder = files.path(folder).absolute()
        self._writes, self._rows_per_part = writes, rows_per_part
        self._tensorboard, self._wandb = tensorboard, wandb
        self._facts: dict[str, Any] = {}
        self._claim: claims.Claim | None = None
        self._parts: Parts | None = None
        self._viewers: list[Events | WandB] = []
        self._head: dict[str, Any] = {"resume_at": 0}

    def start(self, config_json: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        """Takes the folder: writes config.json, or checks that it belongs to the same identity.

        config_json has at least `identity`, and `scientific` and `config` to say what differs. facts: what
        holds for this start only, default `environment()`; kept at the head of each start's metrics too.
        Raises UserError if the folder belongs to another config or another process is writing in it.
        """
        self._facts = dict(environment() if facts is None else facts)
        if not self._writes:
            return
        check_folder(self.folder, config_json)
        place = self.folder / "config.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        if not place.exists():
            write_atomically(place, dumps({**config_json, **self._facts}, indent=1) + "\n")

    def hold(self, step: int) -> None:
        """Takes a folder that has been begun, before its checkpoints are read; raises UserError as `start`.

        step: where it will most likely go on from.
        """
        if self._writes and (self.folder / "config.json").exists():
            self._take()
            self._claim.begin(step)

    def resume_at(self, step: int, trunk: Mapping[str, Any] | None = None) -> None:
        """Says that the run goes on from `step` (0: from the start): rows past it no longer count.

        trunk: the run that the state is from if it isn't this one, {"folder", "identity", ...}; its rows up
        to `step` are this run's rows too, read where they stand. The folder is kept relative to this one.
        """
        assert self._parts is None, "resume_at comes before the first row"
        self._head = {"resume_at": step}
        if trunk is not None:
            place = files.relative(files.path(trunk["folder"]).absolute(), self.folder)
            self._head["trunk"] = {**trunk, "folder": place}
        if self._writes:
            self._claim.begin(step)
            (self.folder / "result.json").unlink(missing_ok=True)  # of a run that was stopped early
            self._open()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Adds numbers to the row of `step`; they survive a kill as soon as parts.py says.

        Raises UserError if this process was still for so long that another one has taken the run over, and
        FileNotFoundError if the folder has gone, or OSError if no sign of this process can be written.
        """
        if not self._writes:
            return
        self.move(step)
        if self._parts is None:
            self._open()
        self._parts.add({"step": int(step), **row})
        for viewer in self._viewers:
            viewer.write(int(step), {name: float(x) for name, x in row.items() if math.isfinite(x)})

    def move(self, step: int) -> None:
        """Says that `step` steps are done; raises as `log` does."""
        if self._claim is not None:
            self._claim.move(step)

    def confirm(self) -> None:
        """Raises as `log` does, after a look at the folder, and writes all rows: for what others build on."""
        if self._claim is not None:
            self._claim.confirm()
        if self._parts is not None:
            self._parts.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, whole or not at all, and gives the folder free; raises as `log` does."""
        if self._writes:
            self.confirm()
            write_atomically(self.folder / "result.json", dumps(result, indent=1) + "\n")
        self.close()

    def close(self) -> None:
        """Gives the folder free; without `finish` before it, the run counts as missing."""
        parts, claim, self._parts, self._claim = self._parts, self._claim, None, None
        viewers, self._viewers = self._viewers, []
        try:
            for thing in (*viewers, parts):
                if thing is not None and not (claim and claim.lost):
                    thing.close()
        finally:
            if claim is not None:
                claim.release()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _take(self) -> None:
        self._claim = self._claim or claims.take(self.folder)
        if self._claim is None:
            busy = f"{self.folder}: another process is running this run; wait for it or end it"
            raise claims.TakenError(busy)

    def _open(self) -> None:
        head = self._head | {"time": time.time(), "facts": self._facts}
        self._parts = Parts(self.folder / "metrics", head, self._rows_per_part)
        if self._tensorboard:
            resumed = self._head["resume_at"]
            self._viewers.append(Events(self.folder / "tensorboard", self._parts.first, resumed))
        if self._wandb:
            self._viewers.append(WandB(self._wandb, self.folder, _read(self.folder / "config.json")))


# ---- reading ----


def load_run(folder: str | Path) -> dict[str, Any]:
    """All about one run but its metrics: the content of config.json, and beside it

    `folder`; `result`: what result.json holds, or None; `status`: the result's ("done", "diverged" or
    "stopped"), or "running" while a process has the folder, or "missing" (never finished: run it again and it
    continues).
    """
    if (run := find_run(folder)) is None:
        raise UserError(f"{folder}: no run here (it has no config.json)")
    return run


def find_run(folder: str | Path) -> dict[str, Any] | None:
    """As `load_run`; None where there is no run."""
    folder = files.path(folder)
    try:
        facts = _read(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        result = _read(folder / "result.json")
    except FileNotFoundError:
        result = None
    if result is not None and "status" not in result:
        raise UserError(f"{folder / 'result.json'} is no result; delete it, and the run is scored again")
    status = result.get("status", "done") if result else "running" if claims.held(folder) else "missing"
    return {**facts, "folder": str(folder), "result": result, "status": status}


def metrics(folder: str | Path) -> "pandas.DataFrame":
    """The metrics of a run, one row a step, with a column `step`; what a step didn't log is nan.

    A branch's first rows are its trunk's, as long as that run's folder is there.
    """
    import pandas

    return pandas.DataFrame(_rows(files.path(folder)) or {"step": []})


def starts(folder: str | Path) -> list[dict[str, Any]]:
    """Every start of a run: {"resume_at": step, "time": seconds since 1970, "facts": {...}}; see `trunk`."""
    return [line for line in _lines(files.path(folder)) if "resume_at" in line]


def trunk(folder: str | Path) -> dict[str, Any] | None:
    """The run whose state this one began with, {"folder", "identity", "from_step", ...}; None: its own."""
    origins = [start for start in starts(folder) if start["resume_at"] == 0 or "trunk" in start]
    return origins[-1].get("trunk") if origins else None


def how_it_ended(result: Mapping[str, Any]) -> str:
    """How a run ended, by its result: done, or diverged or stopped early and at which step."""
    if result["status"] == "done":
        return "done"
    return f"{result['status']} at step {result['steps_done']:,} of {result['steps']:,}"


def load_sweep(folder: str | Path) -> "pandas.DataFrame":
    """One row for each run in `folder` or in folders under it, sorted by name.

    Columns: the config flattened with dots (`model.width`), the cell's fields, the result's (which win),
    `run` (the path under `folder`), `identity` and `status`; runs without a result are listed with the
    status "running" or "missing". Raises UserError if there is no run at all.
    """
    import pandas

    root = files.path(folder)
    rows = []
    for run in _runs(root):
        filled = {"model": run["model"]} if run.get("start") else {}  # with what it takes from elsewhere
        row = _flat(run.get("config", {}) | filled) | _flat(run.get("cell", {})) | (run["result"] or {})
        row |= {"run": files.relative(run["folder"], root)}
        row |= {"identity": run.get("identity"), "status": run["status"]}
        rows.append(row)
    if not rows:
        raise UserError(f"{root}: no runs here (no config.json in it or below it)")
    return pandas.DataFrame(sorted(rows, key=lambda row: row["run"]))


# ---- files ----


def _read(path: Path, text: bytes | None = None) -> dict[str, Any]:
    """The JSON object in a file, or in `text` from it."""
    try:
        value = json.loads(path.read_bytes() if text is None else text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; move the run's folder away and run it again")
    return parsed(value)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all parts in order; a last line that a kill cut in half is left out."""
    parts = sorted((folder / "metrics").glob("[0-9]*.jsonl"))
    for path, text in zip(parts, files.each(lambda path: path.read_bytes(), parts, folder), strict=True):
        for line in text.split(b"\n")[:-1]:
            yield _read(path, line)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows that count, ascending: none past a step that a later part resumed at, and later values win."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _lines(folder):
        if "part" not in line:
            rows.setdefault(line["step"], {}).update(line)
        elif "resume_at" in line:
            rows = _rows_of_trunk(folder, line["trunk"]) if "trunk" in line else rows
            rows = {step: row for step, row in rows.items() if step <= line["resume_at"]}
    return [rows[step] for step in sorted(rows)]


def _rows_of_trunk(folder: Path, trunk: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The trunk's rows by step; none if its folder has gone or belongs to another run by now."""
    place = files.path(folder, trunk["folder"])
    if not (place / "config.json").exists() or _read(place / "config.json")["identity"] != trunk["identity"]:
        return {}
    return {row["step"]: row for row in _rows(place)}


def _runs(root: Path) -> list[dict[str, Any]]:
    """The runs in a folder and below it; what is inside one isn't searched."""
    found, places = [], [root]
    while places:
        there = files.each(find_run, places, root)
        found += filter(None, there)
        others = [place for place, run in zip(places, there, strict=True) if not run]
        places = [inner for inside in files.each(files.folders, others, root) for inner in inside]
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists of dicts as one dict with dotted names; other lists become tuples."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: tuple(value) if isinstance(value, list) else value}
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return out


def chosen_folder(given: str | None, usual: Path) -> Path:
    """The folder that is named, or else the usual one."""
    return files.path(given or usual)


def check_folder(folder: Path, config_json: Mapping[str, Any]) -> None:
    """Raises UserError, naming the first field that differs, if the folder's run isn't the one asked for."""
    if not (folder / "config.json").exists():
        for name in ("result.json", "checkpoints", "metrics"):
            if (folder / name).exists():
                raise UserError(
                    f"{folder} has {name} but no config.json, so nothing says whose it is: put that back or "
                    "choose another folder"
                )
        return
    there, here = _read(folder / "config.json"), parsed(plain(config_json))
    if there.get("identity") == here.get("identity"):
        check_tokenizer(folder, there, here)
        return
    raise UserError(
        f"{folder}: this folder belongs to run {there.get('identity')}, not {here.get('identity')}: "
        f"{_first_difference(there, here)}; choose another folder or remove this one"
    )


def check_tokenizer(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError if the tokens of a run, by its record, aren't those that it would be given here.

    A config says which tokenizer is trained or read; what it does is its library's, of one version.
    """
    before, now = (facts.get("data", {}).get("tokenizer", {}) for facts in (there, here))
    if before and now and before != now:
        old, new = (
            f"{by.get('library') or by.get('kind')} ({by.get('fingerprint')})" for by in (before, now)
        )
        raise UserError(
            f"{folder}: its tokens were made by {old}, and here they are by {new}, which may make others: "
            "install that version, or choose another folder"
        )


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    old, new = _flat(there.get("scientific", {})), _flat(here.get("scientific", {}))
    # A field at its default is not in the scientific part; the full config still tells its value.
    old_all, new_all = _flat(there.get("config", {})), _flat(here.get("config", {}))
    for name in [*new, *(old.keys() - new.keys())]:
        if old.get(name) != new.get(name):
            before = old.get(name, old_all.get(name))
            return f"{name} is {before!r} there and {new.get(name, new_all.get(name))!r} here"
    return f"schema is {there.get('schema')!r} there and {here.get('schema')!r} here"
