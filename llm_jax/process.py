"""What a process that trains is told before: where XLA keeps what it compiled, and what SIGTERM means."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import xla_bridge  # no public way to ask whether devices are in use yet

from llm_jax.config import UserError
from llm_jax.data import cache_folder
from llm_jax.kernels.memory import keep_freed_memory


def prepare_xla(deterministic: bool) -> None:
    """The compilation cache, shared by all runs, and XLA's deterministic operations on GPUs if asked for.

    The autotuner picks kernels by timing them, so its choices are kept too, or a restart may pick others.
    """
    keep_freed_memory()
    place = Path(jax.config.jax_compilation_cache_dir or cache_folder() / "xla")
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    wanted = f"--xla_gpu_deterministic_ops=true --xla_gpu_per_fusion_autotune_cache_dir={place / 'autotune'}"
    if deterministic and wanted not in os.environ.get("XLA_FLAGS", ""):
        if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
            raise UserError(f"--deterministic comes before the first computation: set XLA_FLAGS='{wanted}'")
        (place / "autotune").mkdir(parents=True, exist_ok=True)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {wanted}".strip()


@contextlib.contextmanager
def catching_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the process then ends with 143 when the block does.

    Outside the main thread, where Python allows no handler, nothing sets it.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        raise SystemExit(143)
