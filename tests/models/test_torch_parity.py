"""The same numbers as torch, piece by piece and as whole models assembled from torch's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import parameters

from llm_jax.models.blocks import ACTIVATIONS, normalise
from llm_jax.models.positions import Learned, Rotary, rotate, rotation
from llm_jax.models.transformer import LayerNorm, Transformer

torch = pytest.importorskip("torch")
F = torch.nn.functional


def tensor(x):
    return torch.from_numpy(np.array(x, np.float32))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_norms_and_activations():
    x, scale, shift = 3 * normal(0, 2, 5, 12) + 1, normal(1, 12), normal(2, 12)
    pairs = [
        (
            normalise(x, scale, shift, 1e-5, centre=True),
            F.layer_norm(tensor(x), [12], tensor(scale), tensor(shift)),
        ),
        (normalise(x, scale, None, 1e-5, centre=False), F.rms_norm(tensor(x), [12], tensor(scale), 1e-5)),
        (ACTIVATIONS["gelu"](x), F.gelu(tensor(x), approximate="tanh")),
        (ACTIVATIONS["swiglu"](x), F.silu(tensor(x))),
        (ACTIVATIONS["gelu_erf"](x), F.gelu(tensor(x))),
        (ACTIVATIONS["relu"](x), F.relu(tensor(x))),
        (ACTIVATIONS["relu2"](x), F.relu(tensor(x)) ** 2),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)


def turned(x_BTHK, theta=10_000.0):
    """Rotary positions as a product of complex numbers, of which a head's halves are the two parts."""
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    frequencies = theta ** (-torch.arange(K // 2).double() * 2 / K)
    turn = torch.polar(torch.ones(T, K // 2).double(), torch.outer(torch.arange(T).double(), frequencies))
    z = torch.complex(*x_BTHK.double().chunk(2, dim=-1)) * turn[:, None]
    return torch.cat([z.real, z.imag], dim=-1).float()


def test_rotary_positions():
    x_BTHK = normal(0, 2, 50, 3, 8)
    ours = rotate(x_BTHK, rotation(jnp.arange(50)[None], 8, Rotary(10_000.0)))
    np.testing.assert_allclose(ours, turned(tensor(x_BTHK)), atol=2e-5)


def logits(model, params, tokens):
    return model.unembed(params, model.apply(params, {"tokens": jnp.asarray(tokens)}, None).hidden)


def heads(x, weight, bias=None):
    """x [B, T, D] projected to heads by weight [D, H, K]: [B, H, T, K]."""
    y = torch.einsum("btd,dhk->bhtk", x, weight)
    return y if bias is None else y + bias[:, None]


def test_gpt2_of_torch_modules():
    V, D, H, L = 29, 24, 3, 2
    config = Transformer(
        layers=L, width=D, heads=H, vocabulary=V, positions=Learned(16), norm=LayerNorm(),
        activation="gelu", bias=True,
    )  # fmt: skip
    model = config.build()
    params = parameters(model)
    p = jax.tree.map(tensor, params)
    tokens = np.random.default_rng(0).integers(0, V, (2, 16))
    x = p["embed"]["embedding"][torch.from_numpy(tokens)] + p["embed"]["position"]
    for layer in range(L):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["body"]["0"])
        attention = torch.nn.MultiheadAttention(D, H, batch_first=True)
        mixer = block["mixer"]
        three = [mixer[name].reshape(D, D).T for name in ("query", "key", "value")]
        attention.in_proj_weight.data = torch.cat(three)
        attention.in_proj_bias.data = torch.cat(
            [mixer[f"{n}_bias"].flatten() for n in ("query", "key", "value")]
        )
        attention.out_proj.weight.data = mixer["out"].reshape(D, D).T
        attention.out_proj.bias.data = mixer["out_bias"]
        y = F.layer_norm(x, [D], block["mixer_norm"]["scale"], block["mixer_norm"]["shift"])
        unseen = torch.nn.Transformer.generate_square_subsequent_mask(16)
        x = x + attention(y, y, y, attn_mask=unseen, need_weights=False)[0]
        y = F.layer_norm(x, [D], block["mlp_norm"]["scale"], block["mlp_norm"]["shift"])
        y = F.gelu(F.linear(y, block["mlp"]["up"].T, block["mlp"]["up_bias"]), approximate="tanh")
        x = x + F.linear(y, block["mlp"]["down"].T, block["mlp"]["down_bias"])
    x = F.layer_norm(x, [D], p["norm"]["scale"], p["norm"]["shift"])
    theirs = x @ p["embed"]["embedding"].T
    np.testing.assert_allclose(logits(model, params, tokens), theirs.detach(), atol=1e-4)


def test_llama_of_torch_functions():
    V, D, H, G, L = 29, 24, 6, 2, 2
    config = Transformer(layers=L, width=D, heads=H, kv_heads=G, vocabulary=V, qk_norm=True, tied=False)
    model = config.build()
    params = parameters(model)
    p = jax.tree.map(tensor, params)
    tokens = np.random.default_rng(0).integers(0, V, (2, 16))
    x = p["embed"]["embedding"][torch.from_numpy(tokens)]
    for layer in range(L):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["body"]["0"])
        mixer, mlp = block["mixer"], block["mlp"]
        y = F.rms_norm(x, [D], block["mixer_norm"]["scale"], 1e-5)
        q, k, v = (heads(y, mixer[name]) for name in ("query", "key", "value"))
        q, k = (
            turned(F.rms_norm(z, [4], mixer[f"{name}_scale"], 1e-5).transpose(1, 2)).transpose(1, 2)
            for z, name in ((q, "query"), (k, "key"))
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + torch.einsum("bhtk,hkd->btd", o, mixer["out"])
        y = F.rms_norm(x, [D], block["mlp_norm"]["scale"], 1e-5)
        x = x + (F.silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]
    theirs = F.rms_norm(x, [D], p["norm"]["scale"], 1e-5) @ p["head"]["head"]
    np.testing.assert_allclose(logits(model, params, tokens), theirs, atol=1e-4)
