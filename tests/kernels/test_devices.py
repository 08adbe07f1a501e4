"""The table of devices is found by the names that devices report."""

import types

import jax
import pytest

from llm_jax.kernels.devices import DEVICES, find, peak_flops


def named(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
    ],
)
def test_devices_are_known_by_the_names_they_report(kind, bfloat16):
    assert peak_flops(named(kind), "bfloat16") == bfloat16


def test_memory_tells_forty_from_eighty_gigabytes():
    assert find(named("NVIDIA A100-SXM4-40GB")).memory_bytes == 40e9
    assert find(named("NVIDIA A100-SXM4-80GB")).memory_bytes == 80e9
    assert find(named("NVIDIA A100 80GB PCIe")).bandwidth == 1.935e12


def test_an_unknown_device_or_type_has_no_peak():
    assert peak_flops(jax.devices("cpu")[0], "float32") is None
    assert peak_flops(named("NVIDIA H300"), "bfloat16") is None
    assert peak_flops(named("NVIDIA H100 80GB HBM3"), "int8") is None
    assert peak_flops(named("Tesla T4"), "bfloat16") is None


def test_every_row_is_plausible_and_says_its_source():
    for row in DEVICES:
        assert row.source
        assert 5e12 < row.float32 <= (row.bfloat16 or row.float32) < 5e15
        assert 1e11 < row.bandwidth < 1e13
        assert 5e9 < row.memory_bytes < 3e11
