"""Times in which a folder's disk or bucket doesn't answer, which launchers wait for."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from launch import sweep

SECONDS_OF_PATIENCE = 600.0
SECONDS_OF_CALM = 120.0  # after which an error is a new one


class Outage:
    """Errors of a folder, told once and borne until they have lasted for SECONDS_OF_PATIENCE."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._first, self._last = say, -math.inf, -math.inf

    @contextlib.contextmanager
    def borne(self) -> Iterator[None]:
        """What is done in it is given up at an error of the folder, to be tried again; raises what lasts."""
        try:
            yield
        except OSError as error:
            now = time.monotonic()
            if now - self._last > SECONDS_OF_CALM:
                self._first = now
            if error.filename is None or now - self._first > SECONDS_OF_PATIENCE:
                raise
            if self._first == now:
                patience = sweep.minutes(SECONDS_OF_PATIENCE)
                self._say(f"{error.filename}: {error.strerror}; it is asked again for {patience}")
            self._last = now
