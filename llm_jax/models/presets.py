"""Known models by name.

`--config.model=llama3-8b` takes a preset; its fields can then be overridden like any other. Sizes are those
of the papers and the released checkpoints: GPT-2 (Radford et al. 2019, table 2), Llama 3 (arXiv:2407.21783,
table 3). Small models of any size: `llm_jax/ladder.py`.
"""

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
