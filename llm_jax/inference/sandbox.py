"""Where programs run that a model has written, and nowhere else: no files, no network, no environment, no way
to this process, and limits on time, memory and output.

`monty` is an interpreter of a subset of Python, written for this, in a process of its own (pydantic-monty).
`bubblewrap` is the machine's own Python in namespaces of its own, where bwrap is installed.
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from llm_jax.config import UserError

SECONDS, MEMORY_BYTES, OUTPUT_BYTES = 2.0, 64 << 20, 8 << 10
# Of bubblewrap's: each process has so much address space, which the interpreter takes a part of.
_PROCESSES, _PROCESS_BYTES, _FILES_BYTES = 4, 128 << 20, 16 << 20
# Memory that none of these limits counts: System V's shared segments, queues and semaphores, files in memory
# alone, rings, file systems mounted in a namespace of one's own. Of a machine: its number in the
# kernel's audit, and those of its calls shmget, msgget, semget, memfd_create and mount; then io_uring_setup,
# open_tree, move_mount, fsopen, fsmount and memfd_secret, the same on all.
_UNCOUNTED = {"x86_64": (0xC000003E, 29, 68, 64, 319, 165), "aarch64": (0xC00000B7, 194, 186, 190, 279, 40)}
_UNCOUNTED_EVERYWHERE = (425, 428, 429, 430, 432, 447)


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
    """What the program prints; raises SandboxError for one that fails or is stopped.

    All its processes together have at most 4 x 128 MiB of memory, and 16 MiB of files, which lie in /tmp.
    """
    limits = {"as": _PROCESS_BYTES, "cpu": int(SECONDS), "fsize": _FILES_BYTES, "nofile": 64}
    limits["nproc"] = _PROCESSES + 1  # bwrap's own first process counts
    # Root is free of the limit on processes, so who is root becomes nobody first.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    refused, into = os.pipe()
    with open(into, "wb") as file:
        file.write(_refusing())
    command = [
        *nobody,
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *("--symlink", "usr/bin", "/bin", "--proc", "/proc", "--dev", "/dev", "--hostname", "sandbox"),
        *("--size", str(_FILES_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/"),  # in memory, too, and of no limited size
        *("--seccomp", str(refused)),
        *("/usr/bin/prlimit", *(f"--{name}={most}" for name, most in limits.items()), "--core=0"),
        *("/usr/bin/python3", "-I", "-S", "-c", code),
    ]
    with (
        open(refused, "rb"),
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(refused,),
        ) as process,
    ):
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


def _refusing() -> bytes:
    """What the kernel runs at each system call (classic BPF over struct seccomp_data, seccomp(2)): those of
    _UNCOUNTED get EPERM, as do all of another architecture's.
    """
    machine, *numbers = _UNCOUNTED[platform.machine()]
    numbers += _UNCOUNTED_EVERYWHERE
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # LD | ABS, JMP | JEQ, JMP | JGE, RET
    allow, refuse = 0x7FFF0000, 0x00050001
    last = len(numbers) + 4  # lines before the one that refuses, and which jumps count from the next one
    lines = [(load, 0, 0, 4), (equal, 0, last - 1, machine), (load, 0, 0, 0)]
    lines += [(at_least, last - len(lines), 0, 1 << 30)]  # x86_64's calls of 32-bit pointers
    for number in numbers:
        lines.append((equal, last - len(lines), 0, number))
    lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


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
    if platform.machine() not in _UNCOUNTED:
        raise UserError(f"the tool full_python runs on {' and '.join(_UNCOUNTED)}, not {platform.machine()}")
    try:
        bubblewrap("")
    except (SandboxError, OSError) as error:  # where no namespaces may be made, as in most containers
        raise UserError(f"the tool full_python needs bubblewrap, which doesn't run here: {error}") from None


NEEDS: dict[str, Callable[[], None]] = {"python": _needs_monty, "full_python": _needs_bubblewrap}
