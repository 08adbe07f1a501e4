"""Where programs run that a model has written, and nowhere else: no files, no network, no environment, no way
to this process, and limits on time, memory and output.

`monty` is an interpreter of a subset of Python, written for this, in a process of its own (pydantic-monty).
`bubblewrap` is the machine's own Python in namespaces of its own, where bwrap is installed.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from llm_jax.config import UserError

SECONDS, MEMORY_BYTES, OUTPUT_BYTES = 2.0, 64 << 20, 8 << 10
_FULL_MEMORY_BYTES = 512 << 20  # of address space, which the interpreter itself takes a part of


class SandboxError(RuntimeError):
    """What stopped a program, in words for the model."""


def monty(code: str) -> str:
    """What the program prints, and its last value; raises SandboxError for one that fails or is stopped."""
    import pydantic_monty

    printed = pydantic_monty.CollectString(max_bytes=OUTPUT_BYTES)
    limits = pydantic_monty.ResourceLimits(
        max_feed_duration_secs=SECONDS,
        max_memory=MEMORY_BYTES,
        max_recursion_depth=200,
        max_total_sleep_secs=0.0,
    )
    try:
        with _pool().checkout(limits=limits) as session:
            value = session.feed_run(code, print_callback=printed)
    except pydantic_monty.MontyError as error:
        raise SandboxError(_short(error)) from None
    text = printed.output + ("" if value is None else _shown(value))
    return text.strip() or "(no output)"


def _shown(value: Any) -> str:
    """A value of the sandbox as text: plain data only, and no more of it than is shown."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits
        raise SandboxError("a value that can't be written") from None
    return text[:OUTPUT_BYTES]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


_started: list[Any] = []
_starting = threading.Lock()


def _pool() -> Any:
    """The workers, started with the first program; they end with this process."""
    import atexit

    import pydantic_monty

    with _starting:
        if not _started:
            pool = pydantic_monty.Monty(request_timeout=SECONDS + 3, checkout_timeout=30)
            _started.append(pool.__enter__())
            atexit.register(pool.__exit__, None, None, None)
    return _started[0]


def bubblewrap(code: str) -> str:
    """What the program prints; raises SandboxError for one that fails or is stopped."""
    limits = {"as": _FULL_MEMORY_BYTES, "cpu": int(SECONDS), "fsize": 16 << 20, "nofile": 64, "nproc": 16}
    # Root is free of the limit on processes, so who is root becomes nobody first.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    command = [
        *nobody,
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *("--symlink", "usr/bin", "/bin", "--proc", "/proc", "--dev", "/dev", "--hostname", "sandbox"),
        *("--size", str(16 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("/usr/bin/prlimit", *(f"--{name}={most}" for name, most in limits.items()), "--core=0"),
        *("/usr/bin/python3", "-I", "-S", "-c", code),
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        watch = threading.Timer(2 * SECONDS, process.kill)
        watch.start()
        try:
            output = process.stdout.read(OUTPUT_BYTES)
            over = bool(process.stdout.read(1))
        finally:
            process.kill()
            watch.cancel()
    if over:
        raise SandboxError(f"more than {OUTPUT_BYTES} bytes of output")
    text = output.decode(errors="replace").strip()
    if process.returncode:
        raise SandboxError(_short(Exception(text[-400:] or "stopped: too long, or too much memory")))
    return text or "(no output)"


def _needs_monty() -> None:
    try:
        import pydantic_monty  # noqa: F401
    except ImportError:
        raise UserError(
            "the tool python needs the extra `tools` (pip install 'llm-jax[tools]'): pydantic-monty"
        ) from None


def _needs_bubblewrap() -> None:
    if shutil.which("bwrap") is None or sys.platform != "linux":
        raise UserError("the tool full_python needs bubblewrap: on Debian, apt-get install bubblewrap")
    try:
        bubblewrap("")
    except (SandboxError, OSError) as error:  # where no namespaces may be made, as in most containers
        raise UserError(f"the tool full_python needs bubblewrap, which doesn't run here: {error}") from None


NEEDS: dict[str, Callable[[], None]] = {"python": _needs_monty, "full_python": _needs_bubblewrap}
