"""Every kind of attention computes the definition; the definition sees what it should."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import UserError
from llm_jax.kernels import devices
from llm_jax.kernels.attention import attend, fastest
from llm_jax.kernels.chunked import Rule
from llm_jax.kernels.splash import splash
from llm_jax.sharding import MeshConfig, make_mesh


def inputs(length=150, heads=4, key_heads=2, width=8, batch=2, dtype=jnp.float32):
    """Queries, keys, values, and segments that change within and between blocks."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, length, heads, width), dtype)
    k, v = (jax.random.normal(key, (batch, length, key_heads, width), dtype) for key in keys[1:])
    segments = jnp.stack([jnp.arange(length) // 37, jnp.arange(length) // 90]).astype(jnp.int32)
    return q, k, v, segments


def by_hand(q, k, v, segments, window, softcap):
    """Attention as loops over single queries and heads, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i] and j > i - window]
        scores = k[b, seen, g] @ q[b, i, h] / np.sqrt(q.shape[3])
        weights = np.exp(softcap * np.tanh(scores / softcap))
        out[b, i, h] = weights @ v[b, seen, g] / weights.sum()
    return out


def test_the_reference_is_the_definition_written_as_loops():
    q, k, v, segments = inputs(length=40)
    expected = by_hand(q, k, v, np.asarray(segments), window=9, softcap=2.0)
    got = attend(q, k, v, segments=segments, window=9, softcap=2.0, kind="reference")
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "key_heads", "segmented", "window", "softcap"),
    [
        (150, 4, False, None, None),
        (150, 2, True, None, None),
        (150, 1, True, 50, 2.0),
        (128, 2, True, 1, None),
        (1100, 1, True, 200, 2.0),  # several blocks in a stripe
        (40, 4, False, 1000, 1.0),
    ],
)
def test_chunked_attention_equals_the_reference_with_its_gradient(
    length, key_heads, segmented, window, softcap
):
    q, k, v, segments = inputs(length, key_heads=key_heads)
    options = {"segments": segments if segmented else None, "window": window, "softcap": softcap}

    def weighted(q, k, v, kind):
        out = attend(q, k, v, kind=kind, scale=0.4, **options)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    ((_, expected), expected_gradient), ((_, got), gradient) = (
        run(q, k, v, "reference"),
        run(q, k, v, "chunked"),
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for a, b in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["reference", "chunked"])
def test_no_query_feels_a_later_key_another_segment_or_a_key_before_its_window(kind):
    q, k, v, segments = inputs()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(k, v, i):
        return attend(q, k, v, segments=segments, window=20, kind=kind)[0, i].sum()

    for i in (0, 63, 64, 100):
        felt = sum(np.abs(g[0]).sum((-1, -2)) for g in gradient(k, v, i))
        visible = [j for j in range(150) if i - 20 < j <= i and j // 37 == i // 37]
        np.testing.assert_array_equal(np.flatnonzero(felt), visible)


def test_bfloat16_attention_is_summed_in_float32():
    q, k, v, segments = inputs(dtype=jnp.bfloat16)
    run = jax.jit(attend, static_argnames="kind")
    exact = run(*(x.astype(jnp.float32) for x in (q, k, v)), segments=segments, kind="reference")
    for kind in ("reference", "chunked"):
        got = run(q, k, v, segments=segments, kind=kind)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2e-2)


def test_chunked_attention_never_holds_all_scores():
    q, k, v, _ = inputs(length=2048, heads=1, key_heads=1, batch=1)

    def temporary_bytes(kind):
        gradient = jax.grad(lambda q, k, v: attend(q, k, v, kind=kind).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("chunked") < 2048 * 2048 * 4 / 2 < temporary_bytes("reference")


def test_a_scan_over_layers_keeps_no_mask_of_all_positions():
    q, _, _, segments = inputs(length=2048, heads=1, key_heads=1, batch=1)

    def loss(q):
        layer = lambda x, _: (attend(x, x, x, segments=segments[:1], kind="chunked"), None)  # noqa: E731
        return jax.lax.scan(layer, q, None, length=2)[0].sum()

    shapes = re.findall(r"(?:f32|i32|bool)\[([\d,]+)\]", str(jax.make_jaxpr(jax.grad(loss))(q)))
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < 2048 * 2048 / 4


@pytest.mark.parametrize(("segmented", "window", "softcap"), [(True, None, 2.0), (False, 100, None)])
def test_splash_attention_equals_the_reference_with_its_gradient_on_each_devices_part(
    segmented, window, softcap
):
    q, k, v, segments = inputs(length=128, width=16)
    segments = segments if segmented else None
    rule = Rule(0.4, softcap, window)

    def weighted(attention):
        def loss(*qkv):
            out = attention(*qkv)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    options = {"segments": segments, "scale": 0.4, "window": window, "softcap": softcap}
    (_, expected), expected_gradient = weighted(lambda *qkv: attend(*qkv, kind="reference", **options))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        (_, got), gradient = weighted(lambda *qkv: splash(*qkv, segments, rule, interpret=True))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    for a, b in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_auto_is_splash_on_a_tpu_and_spares_cudnn_a_bias_larger_than_what_it_reads(monkeypatch):
    q, _, _, segments = inputs(length=256, dtype=jnp.bfloat16)
    rule = Rule(1.0, None, None)
    with devices.compiling_for("tpu"):
        assert fastest(q, segments, rule) == "splash"
        assert fastest(q[:, :100], None, rule) == "chunked"
    on_nvidia(monkeypatch)
    assert fastest(q, None, rule) == "cudnn"
    assert fastest(q[:, :128], segments[:, :128], rule) == "cudnn"
    assert fastest(q, segments, rule) == "chunked"


def test_what_a_kind_cannot_do_is_said_in_one_line():
    q, k, v, _ = inputs(length=8)
    with pytest.raises(UserError, match="cudnn cannot run: the device is cpu"):
        attend(q, k, v, kind="cudnn")
    with pytest.raises(UserError, match="splash cannot run: the device is a cpu, not a TPU"):
        attend(q, k, v, kind="splash")
    with pytest.raises(UserError, match="attention=ring needs devices"):
        attend(q, k, v, kind="ring")
    with pytest.raises(UserError, match="there are: auto, reference, chunked, cudnn, splash, ring"):
        attend(q, k, v, kind="fastest")


def on_nvidia(monkeypatch):
    """A process that believes in an NVIDIA GPU, where the call to cuDNN runs as XLA's operations."""
    client = types.SimpleNamespace(platform_version="cuda 12090")
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", client=client)
    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    calls = []

    def fused(*args, implementation, **kwargs):
        calls.append(implementation)
        return xla(*args, **kwargs)

    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    return calls


@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("segmented", [False, True])
def test_what_cudnn_is_asked_for_is_the_definition(monkeypatch, window, segmented):
    q, k, v, segments = inputs(width=16, dtype=jnp.bfloat16)
    options = {"segments": segments if segmented else None, "window": window, "scale": 0.3}
    expected = attend(q, k, v, kind="reference", **options)
    calls = on_nvidia(monkeypatch)
    got = attend(q, k, v, **options)
    assert calls == ["cudnn"]
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)


def test_auto_falls_back_where_cudnn_cannot_and_cudnn_says_why(monkeypatch):
    calls = on_nvidia(monkeypatch)
    q, k, v, segments = inputs(length=9, dtype=jnp.bfloat16)
    wide = [jnp.zeros((1, 8, 1, 160), jnp.bfloat16)] * 3
    single = [x.astype(jnp.float32) for x in (q, k, v)]
    for arrays, options, reason in [
        (single, {}, "not float32"),
        ((q, k, v), {"softcap": 5.0}, "no soft-cap"),
        ((q, k, v), {"segments": segments}, "even number of tokens, not 9"),
        (wide, {}, "at most 128 wide, not 160"),
    ]:
        assert attend(*arrays, **options).shape == arrays[0].shape
        with pytest.raises(UserError, match=reason):
            attend(*arrays, kind="cudnn", **options)
    assert not calls


def test_members_of_a_packed_sweep_attend_as_they_would_alone():
    q, k, v, segments = inputs(length=70)
    members = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    loss = lambda q, k, v: jnp.square(attend(q, k, v, segments=segments, kind="chunked")).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    packed = jax.jit(jax.vmap(jax.grad(loss)))(*members)
    for member in range(2):
        np.testing.assert_allclose(packed[member], gradient(*(x[member] for x in members)), atol=1e-5)
