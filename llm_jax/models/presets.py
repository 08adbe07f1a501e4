"""Known models by name, and a ladder of small ones.

`--config.model=llama3-8b` takes a preset; its fields can then be overridden like any other. Sizes are those
of the papers and the released checkpoints: GPT-2 (Radford et al. 2019, table 2), Llama 3 (arXiv:2407.21783,
table 3).
"""

from typing import Any

from llm_jax.models.positions import Learned, Rotary
from llm_jax.models.transformer import LayerNorm, RMSNorm, Transformer


def _gpt2(layers: int, width: int, heads: int) -> Transformer:
    return Transformer(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=50_257,
        positions=Learned(1024),
        norm=LayerNorm(),
        activation="gelu",
        bias=True,
    )


def _llama3(layers: int, width: int, heads: int, mlp_width: int) -> Transformer:
    return Transformer(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        mlp_width=mlp_width,
        vocabulary=128_256,
        positions=Rotary(theta=500_000.0),
        norm=RMSNorm(),
        tied=False,
        dtype="bfloat16",
    )


PRESETS = {
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "llama3-8b": _llama3(32, 4096, 32, 14_336),
    "llama3-70b": _llama3(80, 8192, 64, 28_672),
    "llama3-405b": _llama3(126, 16_384, 128, 53_248),
}


def ladder(width: int, aspect: int = 32, **fields: Any) -> Transformer:
    """The rung `width` of a ladder of small transformers, all of one shape, so that only size varies.

    Depth is width / aspect, two layers at least. A head is the widest of 32 (from width 512 on 64, from 2048
    on 128) and its halves that divides the width. fields override these and everything else.
    """
    head_width = 32 if width < 512 else 64 if width < 2048 else 128
    while width % head_width:
        head_width //= 2
    shape = {"layers": max(2, round(width / aspect)), "width": width, "heads": width // head_width}
    return Transformer(**{**shape, **fields})
