"""Checkpoints: the state of a run on disk; saved asynchronously, restored onto any mesh, checked bit by bit.

    checkpoints/00000100/        what orbax wrote: every array of the state under its name in the tree
    checkpoints/00000100.json    the manifest: shapes of the arrays, size and SHA-256 of every file

The rule: a checkpoint counts exactly if its manifest stands and every file is as the manifest says. The
manifest is renamed into place after orbax has committed the folder and removed before the folder is, and an
older checkpoint goes only when the newer manifest stands. So a process killed at any moment leaves whole
checkpoints and leftovers, which are ignored and swept away by the next session's first save.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from llm_jax import files, manifest
from llm_jax.config import UserError
from llm_jax.distributed import agreed, leads


def _worth_saying(record: logging.LogRecord) -> bool:
    """Of orbax's about 60 lines a save its warnings are, but no traceback of what it raises as well."""
    if "/orbax/checkpoint/" not in record.pathname:
        return True
    return record.levelno >= logging.WARNING and not (record.exc_info and record.filename == "future.py")


absl.logging.get_absl_logger().addFilter(_worth_saying)  # its one logger, which is orbax's too
_preparing = threading.Lock()  # orbax counts a process's saves, and is told of one at a time
# How a ValueError of tensorstore begins that is about where it reads or writes, not about what it was asked.
_OF_STORAGE = re.compile(r"(?!INVALID_ARGUMENT|UNIMPLEMENTED)[A-Z]+(_[A-Z]+)*: ")
_OF_THE_SYSTEM = re.compile(r"\bos_error_code='(\d+)'")


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run: keeps the newest `keep_last`, the steps in `keep_steps`, and step `best`.

    Reading never changes the folder. In a run of many processes all of them call `save`, `restore` and
    `close`, on a file system that they share; each reads what it wrote for the checksums, and process 0 alone
    writes manifests, compares, and removes.
    `say` is told in one line when a damaged checkpoint is passed over. `confirm` is called before anything is
    removed or a manifest written, and raises where the folder is another owner's by now.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        keep_steps: Sequence[int] = (),
        say: Callable[[str], None] = _warn,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        assert keep_last >= 1, "the newest checkpoint is always kept"
        self.folder = files.path(folder).absolute()
        self._keep_last, self._keep_steps, self._say = keep_last, frozenset(keep_steps), say
        self.best: int | None = None
        self._confirm = confirm
        self._leader = leads()
        self._current: int | None = None  # the step last saved or restored here
        self._swept = False
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future | None = None

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Saves `state` (a pytree of arrays) as that of `step`; returns when it may be changed or donated.

        The rest happens in a thread; an error there is raised by the next call. Waits for a save that is
        still going on. Later steps that an earlier session left behind are superseded: they are removed.
        """
        if step != self._current:
            self.wait()
            if self._leader and not self._swept:
                self._sweep(step)
            self._current, self._swept = None, False  # until it is under way
            arrays = _by_name(state)
            if jax.process_count() == 1 and _on_cpus(arrays):
                # A copy takes a millisecond, and orbax's preparations, which go to the thread, fifteen.
                commit = functools.partial(self._written, step, _copied(arrays))
            else:
                commit = self._begin(step, arrays).result
            self._saving = self._finisher.submit(self._finish, step, commit, _shapes(arrays))
            self._current, self._swept = step, True
        if wait:
            self.wait()

    def latest(self) -> int | None:
        """The newest step that has a manifest (its files are not checked), or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending."""
        return manifest.steps(self.folder)

    def restore(
        self, abstract_state: Any, step: int | None = None, at_most: int | None = None
    ) -> tuple[int, Any] | None:
        """The newest sound checkpoint as (step, state), or None if no save was ever finished.

        abstract_state: the tree with a ShapeDtypeStruct (or an array) for each leaf; its shardings say where
        the state goes, whatever mesh it was saved from. `step` asks for that step and no other, `at_most` for
        none after that one. Raises UserError if none is sound, and for another architecture, naming the first
        array that differs.
        """
        found = self._sound(step, at_most)
        if found is None:
            return None
        state = self._load(found, abstract_state, "", same_type=True)
        self._current = found
        return found, state

    def restore_params(self, abstract_params: Any, part: str = "trained", step: int | None = None) -> Any:
        """The subtree `part` of the newest sound state (or that of `step`); nothing else is read.

        Leaves are converted to the types of `abstract_params`. Raises UserError as `restore` does, and where
        there is no checkpoint.
        """
        found = self._sound(step)
        if found is None:
            raise UserError(
                f"{self.folder}: no checkpoint here; train first, or name the run's checkpoints folder"
            )
        return self._load(found, abstract_params, f"{part}/", same_type=False)

    def wait(self) -> None:
        """Returns when the save under way, if any, stands complete with its manifest; raises its error."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            try:
                saving.result()
            except BaseException:
                self._current, self._swept = None, False  # the next save clears what this one left
                raise

    def close(self) -> None:
        """Waits for the save under way and ends the thread."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()

    # ---- writing (only process 0 writes, and only here) ----

    def _begin(self, step: int, arrays: dict[str, jax.Array]) -> Any:
        """Orbax's save: what it returns waits for its end. Then `arrays` may be donated."""
        context = ocp.Context()
        context.array.saving.use_compression = False  # a twelfth smaller for twice the CPU time
        # Where arrays lay is a quarter of the time and never asked for: `restore` says where they go.
        context.array.saving.enable_write_sharding_file = False
        with _preparing, context, _storage(self._place(step)):
            return ocp.save_async(os.fspath(self._place(step)), arrays)

    def _written(self, step: int, arrays: dict[str, jax.Array]) -> None:
        self._begin(step, arrays).result()

    def _finish(self, step: int, commit: Callable[[], None], shapes: dict[str, list]) -> None:
        """In the thread: orbax's commit and checksums, in all processes; the manifest; then the retention."""
        with _storage(self._place(step)):
            commit()
            digests = manifest.digests(self._place(step))
            if not self._leader:
                return
            self._confirm()
            manifest.write(self._place(step), digests, {"step": step, "arrays": shapes})
            for old in self.steps()[: -self._keep_last]:
                if old not in self._keep_steps and old != self.best:
                    self._remove(old)

    def _sweep(self, step: int) -> None:
        """Removes what the session before left behind: later steps and saves that were never finished."""
        self._confirm()
        self.folder.mkdir(parents=True, exist_ok=True)
        last = step - 1 if self._current is None else min(step - 1, self._current)
        for old in self.steps():
            if old > last:
                self._remove(old)
        kept = self.steps()
        for path in list(self.folder.glob("*")):
            name, _, ending = path.name.partition(".")
            if name.isdecimal() and (ending not in ("", "json") or int(name) not in kept):
                files.remove(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _remove(self, step: int) -> None:
        manifest.place(self._place(step)).unlink(missing_ok=True)  # a bucket may be asked twice
        files.remove(self._place(step))

    def _place(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    # ---- reading ----

    def _sound(self, step: int | None, at_most: int | None = None) -> int | None:
        """The step to restore, the same in every process; each of them checks its own files."""
        steps, passed = agreed(lambda: self._candidates(step, at_most))
        for found in steps:
            problem = manifest.problem(self._place(found))
            if problem is None:
                if passed and self._leader:
                    self._say(f"{self.folder}: passed over {', '.join(passed)}; continuing from step {found}")
                return found
            if step is not None:
                raise UserError(f"{self._place(step)}: the checkpoint is damaged ({problem})")
            passed.append(f"{self._place(found).name} ({problem})")
        if steps:
            raise UserError(
                f"{self.folder}: no checkpoint is whole: {', '.join(passed)}; remove it to start again"
            )
        return None

    def _candidates(self, step: int | None, at_most: int | None) -> tuple[list[int], list[str]]:
        """The steps that may be restored, the newest first, and what is passed over, with the reason."""
        there = self.steps()
        if step is not None:
            if step not in there:
                raise UserError(f"{self.folder}: no checkpoint of step {step}; there are: {there or 'none'}")
            return [step], []
        last = float("inf") if at_most is None else at_most
        steps = [step for step in there if step <= last]
        passed = [
            f"{path.name} (its save was not finished)"
            for path in sorted(self.folder.glob("*"), reverse=True)
            if path.name.isdecimal() and (steps[-1] if steps else -1) < int(path.name) <= last
        ]
        return steps[::-1], passed

    def _load(self, step: int, abstract: Any, prefix: str, same_type: bool) -> Any:
        stored = manifest.read(self._place(step))["arrays"]
        stored = {name: shape for name, shape in stored.items() if name.startswith(prefix)}
        wanted = _by_name(abstract, prefix)
        _compare(self._place(step), stored, _shapes(wanted), same_type)
        targets = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or _here())
            for name, x in wanted.items()
        }
        context = ocp.Context()
        context.pytree_options.loading.partial_load = bool(prefix)
        with context, _storage(self._place(step)):
            arrays = ocp.load(os.fspath(self._place(step)), targets)
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in targets])


@contextlib.contextmanager
def _storage(place: Path) -> Iterator[None]:
    """What libraries say of the disk or the bucket of `place` is an OSError with its reason, in one line."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        said, known = str(error), isinstance(error, OSError)
        if known and error.filename is not None:
            raise
        if not (known or files.in_bucket(place) or _OF_STORAGE.match(said)):
            raise
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if found := _OF_THE_SYSTEM.search(said):
            number, reason = int(found[1]), os.strerror(int(found[1]))
        reason = reason or said.partition("[tensorstore_spec")[0].strip() or type(error).__name__
        raise OSError(number or errno.EIO, reason.splitlines()[0], str(place)) from error


def _by_name(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves by their place in the tree, such as trained/blocks/query; in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {prefix + jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one name"
    return named


def _on_cpus(arrays: dict[str, Any]) -> bool:
    return all(
        isinstance(x, jax.Array) and {device.platform for device in x.devices()} == {"cpu"}
        for x in arrays.values()
    )


@jax.jit
def _copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, arrays)


def _shapes(arrays: dict[str, Any]) -> dict[str, list]:
    return {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _compare(place: Path, stored: dict, wanted: dict, same_type: bool) -> None:
    """Raises UserError at the first array that differs between a checkpoint and what is asked for."""

    def say(entry: list | None) -> str:
        return f"{entry[0]}{entry[1]}" if entry else "absent"

    for name in [*wanted, *(stored.keys() - wanted.keys())]:
        there, here = stored.get(name), wanted.get(name)
        if there is None or here is None or there[1] != here[1] or (same_type and there != here):
            raise UserError(
                f"{place}: the checkpoint is of another architecture: {name} is {say(there)} there "
                f"and {say(here)} here; use the config it was trained with, or another folder"
            )
