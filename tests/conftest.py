"""Shared fixtures: the compilation cache, the reference data's place, eight fake devices."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def reference_data() -> pathlib.Path:
    """The folder of published numbers and real corpora; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("LLM_JAX_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set LLM_JAX_REFERENCE_DATA")
    return folder
