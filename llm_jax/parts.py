"""The metrics of a run as they are written: numbered parts of JSON lines, metrics/00000.jsonl and so on.

On a disk a line stands as soon as it is added. Objects of a bucket can't be added to: there lines wait for
the next part, which is made after half a minute (later, after a hundredth of the time since the start), and
by `flush`, which comes before a checkpoint counts. What a kill takes is trained again, line for line.
"""

import io
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.files import dumps, in_bucket

SECONDS, PART_OF_THE_TIME = 30.0, 0.01


class Parts:
    """The parts that one start writes in `folder`, with `head` in the first line of the first one.

    All raise FileExistsError where another process has made the part in the meantime, and from then on.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], rows_per_part: int = 10_000) -> None:
        self._folder, self._rows_per_part, self._waits = folder, rows_per_part, in_bucket(folder)
        self._part: Any = None
        self._refused: FileExistsError | None = None
        self._writing = threading.Lock()  # a checkpoint's thread flushes
        folder.mkdir(parents=True, exist_ok=True)
        self.first = self._next = 1 + max((int(p.stem) for p in folder.glob("[0-9]*.jsonl")), default=-1)
        self._begun = self._ended = time.monotonic()
        self._begin(head)
        self.flush()

    def add(self, row: Mapping[str, Any]) -> None:
        """A line more; of objects, on its way."""
        with self._writing:
            if self._part is None or self._rows >= self._rows_per_part:
                self._end()
                self._begin({})
            self._part.write(dumps(row) + "\n")
            self._rows += 1
            now = time.monotonic()
            if self._waits and now - self._ended > max(SECONDS, PART_OF_THE_TIME * (now - self._begun)):
                self._end()

    def flush(self) -> None:
        """All lines stand when it returns."""
        with self._writing:
            if self._waits:
                self._end()

    def close(self) -> None:
        with self._writing:
            self._end()

    def _begin(self, head: Mapping[str, Any]) -> None:
        if self._refused:
            raise self._refused
        self._place = self._folder / f"{self._next:05d}.jsonl"
        self._part = io.StringIO() if self._waits else self._place.open("x", buffering=1)
        self._part.write(dumps({"part": self._next} | dict(head)) + "\n")
        self._next, self._rows = self._next + 1, 0

    def _end(self) -> None:
        """What can't be uploaded now waits for the next try, as it is: it may stand already, unanswered."""
        if self._part is None:
            return
        if self._waits:
            self._rows = self._rows_per_part
            try:
                self._place.create_bytes(self._part.getvalue().encode())
            except FileExistsError as error:  # no later number either: the other one needs it next
                self._refused, self._part = error, None
                raise
        part, self._part, self._ended = self._part, None, time.monotonic()
        part.close()
