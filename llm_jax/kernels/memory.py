"""The memory of the host: where a CPU loses a third of a small model's step."""

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, in one pool, for this process; True if it could.

    XLA allocates its temporary buffers anew in each step. glibc gives blocks of megabytes back to the system
    when they are freed, and the system hands pages out by a fault for each 4 kB, zeroed: 20,000 to 126,000
    faults a step on the shapes of experiments/throughput.py, 30 to 40 % of the processor's time. The price is
    that the process stays as large as it ever was. Call it before the first computation: a thread keeps the
    pool it began with. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    never = 2**31 - 1
    return bool(
        mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, never)
    )
