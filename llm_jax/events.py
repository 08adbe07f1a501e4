"""Metrics as TensorBoard events: `tensorboard --logdir runs` draws them. Nothing else reads them."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path


class Events:
    """One session's event file, in TensorBoard's own format; each row is on disk when `write` returns.

    resumed: the step that the session goes on from; viewers drop what earlier files say of later steps.
    """

    def __init__(self, folder: Path, session: int, resumed: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # late: nobody else needs them
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{session:05d}"
        self._writer = RecordWriter((folder / name).open("xb", buffering=0))
        self._add(file_version="brain.Event:2")
        if session:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resumed + 1, session_log=start)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """The numbers of one step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _add(self, **content: object) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
