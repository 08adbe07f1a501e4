"""Times in which a disk or a bucket doesn't answer, which launchers wait for."""

import contextlib
import time
from collections.abc import Callable, Iterator

SECONDS_OF_OUTAGE = 600.0


class Outage:
    """Errors of the system, told once and borne until they have lasted for SECONDS_OF_OUTAGE.

    say: what tells of them in a line.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._say, self._since = say, None

    @contextlib.contextmanager
    def borne(self) -> Iterator[None]:
        """What happens in it is given up at an OSError, to be tried again; raises one that lasts."""
        try:
            yield
        except OSError as error:
            if self._since is None:
                self._since = time.monotonic()
                self._say(f"{error.filename or 'the folder'}: {error.strerror or error}; looking again")
            elif time.monotonic() - self._since > SECONDS_OF_OUTAGE:
                raise
        else:
            self._since = None
