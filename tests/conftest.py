"""Shared fixtures: the compilation cache, the reference data's place, eight fake devices."""

import contextlib
import gc
import os
import pathlib
import runpy
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator

import hasty

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", hasty.flags(devices=8))

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
gc.set_threshold(100_000, 50, 100)  # what is traced is many objects; looking for cycles takes a tenth
jax.devices()  # before a test sets XLA_FLAGS for the processes that it starts


@pytest.fixture(scope="session")
def reference_data() -> pathlib.Path:
    """The folder of published numbers and real corpora; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("LLM_JAX_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set LLM_JAX_REFERENCE_DATA")
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:  # noqa: F821 (imported late)
    """Debian's Chromium; tests that need it are skipped where it is not installed."""
    from browser import Browser

    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here: on Debian, apt-get install chromium")
    with contextlib.closing(Browser(program, tmp_path_factory.mktemp("chromium"))) as found:
        yield found


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """gs://runs of an emulator; tests that need it are skipped where there is none, or no gcsfs."""
    from emulator import emulated

    with emulated("runs") as place:
        yield place


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command as `python -m` would, in this process: (exit code, stdout, stderr)."""
    from absl import app, flags

    from llm_jax import command_line

    app.define_help_flags()  # absl does so once in a process

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        before = set(flags.FLAGS)
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # imported here too
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        command_line._overrides.clear()
        command_line._help.clear()
        return end.value.code, *capfd.readouterr()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pattern for 40 small text files of words with some structure to learn; their cache lies apart."""
    folder = tmp_path_factory.mktemp("corpus")
    os.environ["LLM_JAX_CACHE"] = str(folder / "cache")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), size=random.integers(2, 7))) for _ in range(50)]
    for number in range(40):
        chosen = random.choice(words, size=600, p=np.arange(50, 0, -1) / 1275)
        (folder / f"{number:02d}.txt").write_text(" ".join(chosen) + "\n")
    return str(folder / "*.txt")


@pytest.fixture(scope="session")
def tiny_run(corpus: str) -> "Run":  # noqa: F821 (imported late: it imports jax)
    """Forty steps of a small transformer on `corpus`: seconds, compilation included."""
    from llm_jax.data import Files, Text
    from llm_jax.models.transformer import Transformer
    from llm_jax.optimizers import AdamW
    from llm_jax.run import Run

    data = Text(corpus=Files((corpus,)), sequence_length=32, batch_size=8)
    model = Transformer(layers=2, width=32, heads=4)
    return Run(model, data, AdamW(learning_rate=3e-3), tokens=40 * 8 * 32)
