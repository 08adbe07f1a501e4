"""Steps after the first find their memory where the step before left it."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from llm_jax.kernels.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
x, w = jnp.ones((2048, 64)), jnp.ones((64, 8192))
step = jax.jit(lambda x: jnp.tanh(jnp.sin(x @ w) @ w.T))
each = []
for _ in range(25):  # the first few find what they keep
    before = faults()
    x = step(x).block_until_ready()
    each.append(faults() - before)
print(statistics.median(each))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_kept_memory_is_not_fetched_again_at_every_step():
    def faults_per_step(mode):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        )
        return float(run.stdout)

    pages = 2048 * 8192 * 4 / 4096  # of a step's intermediate result
    assert faults_per_step("leave") > pages / 2
    assert faults_per_step("keep") < pages / 10
