"""Metrics for viewers: TensorBoard's events, and Weights & Biases. Nothing here reads them."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import UserError
from llm_jax.files import in_bucket


class Events:
    """For `tensorboard --logdir runs`: one session's file of events; a row is on disk when `write` returns.

    In a bucket the file is there once it is closed; what is killed leaves none, and its metrics tell all.
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


class WandB:
    """A run at Weights & Biases, by the name of its identity, so that a continued one goes on there.

    Whether it is sent or kept in `folder` (of a disk) is theirs to say: WANDB_MODE=offline. Raises UserError
    where their package isn't installed.
    """

    def __init__(self, project: str, folder: Path, facts: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("execution.wandb needs their package: pip install wandb") from None
        self._run = wandb.init(
            project=project,
            id=facts["identity"],
            name=facts.get("name") or facts["identity"],
            config=dict(facts.get("config", {})),
            dir=None if in_bucket(folder) else str(folder),
            resume="allow",
            reinit="create_new",  # the members of a pack are in one process
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """The numbers of one step."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()
