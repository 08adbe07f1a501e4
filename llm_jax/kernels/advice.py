"""When memory runs out: which knob to turn, and by how much."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from llm_jax import files
from llm_jax.values import UserError

PROFILE = "memory.pprof"


def advice(kept: float, between: float, room: float, rows: int, micro_batches: int, remat: str) -> str:
    """What brings a step into `room` bytes of each device.

    kept: bytes of the state and what stands beside it as long as the step runs. between: bytes of what comes
    and goes, activations above all, which are those of rows / micro_batches rows at once.
    """
    knobs = []
    if kept < room:
        least = micro_batches * between / (room - kept)
        fitting = [n for n in range(micro_batches + 1, rows + 1) if rows % n == 0 and n >= least]
        if fitting:
            fewer = between * micro_batches / fitting[0]
            knobs.append(
                f"--config.execution.micro_batches={fitting[0]} (activations of {between / 1e9:,.3g} GB "
                f"become about {fewer / 1e9:,.3g})"
            )
    if remat == "none":
        knobs.append("--config.execution.layout.remat=full (a third more to compute)")
    if kept + between / rows * micro_batches > room:
        devices = 2 ** math.ceil(math.log2(1.25 * kept / room))
        spread = f"--config.execution.mesh.fsdp={max(2, devices)}"
        knobs.append(f"{spread} (the state over so many devices)")
    knobs.append("a smaller --config.data.batch_size, which is another run")
    return "; or ".join(knobs)


@contextlib.contextmanager
def explaining(folder: Path, advise: Callable[[], str]) -> Iterator[None]:
    """Where a device's memory runs out inside: a UserError with advice, and a profile of what is there."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # What is full may fail here too.
        with contextlib.suppress(Exception), files.filled(folder) as place:
            jax.profiler.save_device_memory_profile(str(place / PROFILE))
        first = str(error).splitlines()[0]
        raise UserError(
            f"{first}; to fit, {advise()}; `pprof -top {folder / PROFILE}` shows what was in it"
        ) from error
