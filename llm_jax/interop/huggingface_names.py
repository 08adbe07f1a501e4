"""What tensors are called in Hugging Face's format and how they lie there: a table for each kind of model."""

from collections.abc import Mapping

from llm_jax.interop.layouts import Entry, Table


def _block(names: Mapping[str, tuple[str, str]], prefix: str = "model.layers.{layer}.") -> Table:
    return {ours: Entry(prefix + name, pattern) for ours, (name, pattern) in names.items()}


LLAMA = {
    "embed/embedding": Entry("model.embed_tokens.weight", "V D"),
    "norm/scale": Entry("model.norm.weight", "D"),
    "head/head": Entry("lm_head.weight", "V D -> D V"),
} | _block(
    {
        "mixer_norm/scale": ("input_layernorm.weight", "D"),
        "mixer/query": ("self_attn.q_proj.weight", "(H K) D -> D H K"),
        "mixer/key": ("self_attn.k_proj.weight", "(G K) D -> D G K"),
        "mixer/value": ("self_attn.v_proj.weight", "(G K) D -> D G K"),
        "mixer/out": ("self_attn.o_proj.weight", "D (H K) -> H K D"),
        "mixer/query_bias": ("self_attn.q_proj.bias", "(H K) -> H K"),
        "mixer/key_bias": ("self_attn.k_proj.bias", "(G K) -> G K"),
        "mixer/value_bias": ("self_attn.v_proj.bias", "(G K) -> G K"),
        "mixer/out_bias": ("self_attn.o_proj.bias", "D"),
        "mixer/query_scale": ("self_attn.q_norm.weight", "K"),
        "mixer/key_scale": ("self_attn.k_norm.weight", "K"),
        "mixer/queries_scale": ("self_attn.q_norm.weight", "(H K) -> H K"),
        "mixer/keys_scale": ("self_attn.k_norm.weight", "(G K) -> G K"),
        "mlp_norm/scale": ("post_attention_layernorm.weight", "D"),
        "mlp/gate": ("mlp.gate_proj.weight", "F D -> D F"),
        "mlp/up": ("mlp.up_proj.weight", "F D -> D F"),
        "mlp/down": ("mlp.down_proj.weight", "D F -> F D"),
        "mlp/gate_bias": ("mlp.gate_proj.bias", "F"),
        "mlp/up_bias": ("mlp.up_proj.bias", "F"),
        "mlp/down_bias": ("mlp.down_proj.bias", "D"),
    }
)

GEMMA = {ours.replace("scale", "gain"): entry for ours, entry in LLAMA.items()}
GEMMA2 = GEMMA | _block(
    {
        "mixer_out_norm/gain": ("post_attention_layernorm.weight", "D"),
        "mlp_norm/gain": ("pre_feedforward_layernorm.weight", "D"),
        "mlp_out_norm/gain": ("post_feedforward_layernorm.weight", "D"),
    }
)
OLMO2 = LLAMA | _block(
    {
        "mixer_norm/scale": ("post_attention_layernorm.weight", "D"),
        "mlp_norm/scale": ("post_feedforward_layernorm.weight", "D"),
    }
)
OLMOE = LLAMA | _block(
    {
        "mlp/router": ("mlp.gate.weight", "E D -> D E"),
        "mlp/expert_gate": ("mlp.experts.{expert}.gate_proj.weight", "X D -> D X"),
        "mlp/expert_up": ("mlp.experts.{expert}.up_proj.weight", "X D -> D X"),
        "mlp/expert_down": ("mlp.experts.{expert}.down_proj.weight", "D X -> X D"),
    }
)
MIXTRAL = LLAMA | _block(
    {
        "mlp/router": ("block_sparse_moe.gate.weight", "E D -> D E"),
        "mlp/expert_gate": ("block_sparse_moe.experts.{expert}.w1.weight", "X D -> D X"),
        "mlp/expert_up": ("block_sparse_moe.experts.{expert}.w3.weight", "X D -> D X"),
        "mlp/expert_down": ("block_sparse_moe.experts.{expert}.w2.weight", "D X -> X D"),
    }
)
_ATTENTION = "transformer.h.{layer}.attn.c_attn."  # queries, keys and values side by side
GPT2 = {
    "embed/embedding": Entry("transformer.wte.weight", "V D"),
    "embed/position": Entry("transformer.wpe.weight", "T D"),
    "norm/scale": Entry("transformer.ln_f.weight", "D"),
    "norm/shift": Entry("transformer.ln_f.bias", "D"),
    "head/head": Entry("lm_head.weight", "V D -> D V"),
    **{
        f"mixer/{name}": Entry(f"{_ATTENTION}weight", "D (H K) -> D H K", (part, 3))
        for part, name in enumerate(("query", "key", "value"))
    },
    **{
        f"mixer/{name}_bias": Entry(f"{_ATTENTION}bias", "(H K) -> H K", (part, 3))
        for part, name in enumerate(("query", "key", "value"))
    },
} | _block(
    {
        "mixer_norm/scale": ("ln_1.weight", "D"),
        "mixer_norm/shift": ("ln_1.bias", "D"),
        "mixer/out": ("attn.c_proj.weight", "(H K) D -> H K D"),
        "mixer/out_bias": ("attn.c_proj.bias", "D"),
        "mlp_norm/scale": ("ln_2.weight", "D"),
        "mlp_norm/shift": ("ln_2.bias", "D"),
        "mlp/up": ("mlp.c_fc.weight", "D F"),
        "mlp/up_bias": ("mlp.c_fc.bias", "F"),
        "mlp/down": ("mlp.c_proj.weight", "F D"),
        "mlp/down_bias": ("mlp.c_proj.bias", "D"),
    },
    prefix="transformer.h.{layer}.",
)
