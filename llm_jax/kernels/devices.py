"""What devices can do at best, by their makers' data sheets: the denominators of MFU.

The figures are dense (no sparsity) and for what JAX calls one device: a chip, or one of the two cores of a
TPU v2, v3 or v7 chip. `float32` is what float32 matrix products run at by JAX's default precision: TF32 on
NVIDIA's tensor cores (none before Ampere), one bfloat16 pass on TPUs.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

_target: list[str] = []


def platform() -> str:
    """Which kind of device programs are traced for: the one at hand, unless `compiling_for` names another."""
    return _target[-1] if _target else jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for devices of another kind, described only."""
    _target.append(platform)
    try:
        yield
    finally:
        _target.pop()


class Device(NamedTuple):
    """Peaks of one device; None where it has no unit for that type."""

    pattern: str  # a regular expression, searched in jax.Device.device_kind
    bfloat16: float | None  # FLOP/s
    float32: float | None  # FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory_bytes: float
    source: str


_TPU = "cloud.google.com/tpu/docs/"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"

# The first row whose pattern is found counts.
DEVICES = (
    Device(r"H100 PCIe", 756e12, 378e12, 2.0e12, 80e9, _H100),
    Device(r"H100 NVL", 835.5e12, 417.5e12, 3.9e12, 94e9, _H100),
    Device(r"H100", 989.4e12, 494.7e12, 3.35e12, 80e9, f"{_H100} (SXM)"),
    Device(r"H200 NVL", 835.5e12, 417.5e12, 4.8e12, 141e9, "NVIDIA H200 Tensor Core GPU data sheet"),
    Device(r"\bH200", 989.4e12, 494.7e12, 4.8e12, 141e9, "NVIDIA H200 Tensor Core GPU data sheet (SXM)"),
    Device(r"A100.*40GB", 312e12, 156e12, 1.555e12, 40e9, _A100),
    Device(r"A100.*PCI", 312e12, 156e12, 1.935e12, 80e9, _A100),
    Device(r"A100.*80GB", 312e12, 156e12, 2.039e12, 80e9, f"{_A100} (SXM)"),
    Device(r"L40S", 362.05e12, 183e12, 864e9, 48e9, "NVIDIA L40S data sheet"),
    Device(r"\bL4\b", 121e12, 60e12, 300e9, 24e9, "NVIDIA L4 data sheet"),
    Device(r"RTX 4090$", 165.2e12, 82.6e12, 1008e9, 24e9, "NVIDIA Ada GPU architecture, appendix A"),
    Device(r"RTX 3090$", 71e12, 35.6e12, 936e9, 24e9, "NVIDIA Ampere GA102 architecture, appendix A"),
    Device(r"V100-SXM", None, 15.7e12, 900e9, 16e9, "NVIDIA V100 data sheet"),
    Device(r"\bT4\b", None, 8.1e12, 320e9, 16e9, "NVIDIA T4 data sheet"),
    Device(r"TPU v2", 23e12, 23e12, 350e9, 8 * 2**30, f"{_TPU}v2"),
    Device(r"TPU v3", 61.5e12, 61.5e12, 450e9, 16 * 2**30, f"{_TPU}v3"),
    Device(r"TPU v4$", 275e12, 275e12, 1200e9, 32 * 2**30, f"{_TPU}v4"),
    Device(r"TPU v5( lite|e)", 197e12, 197e12, 819e9, 16 * 2**30, f"{_TPU}v5e"),
    Device(r"TPU v5p?$", 459e12, 459e12, 2765e9, 95 * 2**30, f"{_TPU}v5p"),
    Device(r"TPU v6( lite|e)", 918e12, 918e12, 1638e9, 32 * 2**30, f"{_TPU}v6e"),
    Device(r"TPU7x", 1153.5e12, 1153.5e12, 3690e9, 96 * 2**30, f"{_TPU}tpu7x"),
)


def find(device: jax.Device) -> Device | None:
    """The row of a device; None if the table doesn't have it (any CPU, for one)."""
    return next((row for row in DEVICES if re.search(row.pattern, device.device_kind)), None)


def peak_flops(device: jax.Device, dtype: str | jnp.dtype) -> float | None:
    """FLOP/s of matrix products on inputs of `dtype` (float16 runs as bfloat16 does); None if unknown."""
    row = find(device)
    names = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "float32"}
    name = names.get(jnp.dtype(dtype).name)
    return None if row is None or name is None else getattr(row, name)
