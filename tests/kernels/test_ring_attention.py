"""A sequence over eight devices is attended to as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import inputs

from llm_jax.config import UserError
from llm_jax.kernels import ring_attention
from llm_jax.kernels.attention import attend
from llm_jax.sharding import MeshConfig, make_mesh


def around(q, k, v, segments, **options):
    """Ring attention of arrays in the order of time, on the mesh at hand."""
    order = ring_attention.zigzag(q.shape[1], ring_attention.ways())
    dealt = jax.tree.map(lambda x: x[:, order], (q, k, v, segments))
    out = attend(*dealt[:3], segments=dealt[3], kind="ring", **options)
    return ring_attention.in_order(out.reshape(*out.shape[:2], -1)).reshape(q.shape)


def test_the_zigzag_gives_each_device_an_early_chunk_and_a_late_one():
    assert ring_attention.zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"96 tokens doesn't divide .*sequence=5.*multiple of 10"):
        ring_attention.zigzag(96, 5)


@pytest.mark.parametrize(
    ("sizes", "segmented", "options"),
    [
        ({"sequence": 4}, True, {"softcap": 2.0}),
        ({"data": 2, "sequence": 2, "tensor": 2}, False, {"window": 21}),
        ({"sequence": 3}, True, {"window": 30}),
    ],
)
def test_ring_attention_equals_the_reference_with_its_gradient(sizes, segmented, options):
    q, k, v, segments = inputs(length=96, heads=4, key_heads=2)
    segments = segments if segmented else None
    weights = jnp.cos(jnp.arange(q.size).reshape(q.shape))

    def weighted(attention):
        def loss(*qkv):
            out = attention(*qkv)
            return (out * weights).sum(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradient

    expected = weighted(lambda *qkv: attend(*qkv, segments=segments, kind="reference", **options))
    with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1} | sizes)))):
        got = weighted(lambda *qkv: around(*qkv, segments, **options))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_eight_devices_take_a_sequence_eight_times_as_long_in_the_memory_of_one():
    """What lies between arguments and results, which are as large, of the forward pass and the gradient."""

    def temporary_bytes(length, ways):
        mesh = make_mesh(MeshConfig(data=1, sequence=ways), jax.devices()[:ways])
        with jax.set_mesh(mesh):
            place = jax.NamedSharding(mesh, jax.P(None, "sequence"))
            x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32, sharding=place)
            segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
            kind = "ring" if ways > 1 else "chunked"
            loss = lambda *qkv: attend(*qkv[:3], segments=qkv[3], kind=kind).sum()  # noqa: E731
            step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, segments)
            return step.compile().memory_analysis().temp_size_in_bytes

    one, each = temporary_bytes(2048, 1), temporary_bytes(8 * 2048, 8)
    assert 0.5 * one < each <= one


def test_in_bfloat16_a_result_is_rounded_once_however_many_turns_it_takes():
    v = jax.random.normal(jax.random.key(0), (2, 128, 2, 16), jnp.bfloat16)
    alike = jnp.zeros_like(v)  # every key has the same weight, so nothing but results is rounded
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=8))):
        got = jax.jit(lambda v: around(alike, alike, v, jnp.zeros((2, 128), jnp.int32)))(v)
    exact = np.cumsum(np.asarray(v, np.float64), axis=1) / np.arange(1, 129)[:, None, None]
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_members_of_a_packed_sweep_go_round_as_they_would_alone():
    q, k, v, segments = inputs(length=32)
    members = [jnp.stack([x, x / 2]) for x in (q, k, v)]
    gradient = jax.grad(lambda *qkv: jnp.square(around(*qkv, segments)).sum(), argnums=(0, 1, 2))
    with jax.set_mesh(make_mesh(MeshConfig(member=2, data=1, sequence=2))):
        packed = jax.jit(jax.vmap(gradient, spmd_axis_name="member"))(*members)
    alone = jax.jit(
        jax.grad(lambda *qkv: jnp.square(attend(*qkv, segments=segments)).sum(), argnums=(0, 1, 2))
    )
    for member in range(2):
        for a, b in zip(packed, alone(*(x[member] for x in members)), strict=True):
            np.testing.assert_allclose(a[member], b, atol=2e-5)
