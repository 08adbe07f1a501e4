"""What llama.cpp calls things: a table of tensors and one of keys for each architecture of GGUF files.

Metadata is turned into the keys of Hugging Face's config.json: a family says once what a config means.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llm_jax.interop.layouts import Entry, Table

# ---- tensors ----


def _block(names: Mapping[str, tuple[str, str]]) -> Table:
    return {ours: Entry(f"blk.{{layer}}.{name}", pattern) for ours, (name, pattern) in names.items()}


QWEN = {
    "embed/embedding": Entry("token_embd.weight", "V D"),
    "norm/scale": Entry("output_norm.weight", "D"),
    "head/head": Entry("output.weight", "V D -> D V"),
} | _block(
    {
        "mixer_norm/scale": ("attn_norm.weight", "D"),
        "mixer/query": ("attn_q.weight", "(H K) D -> D H K"),
        "mixer/key": ("attn_k.weight", "(G K) D -> D G K"),
        "mixer/value": ("attn_v.weight", "(G K) D -> D G K"),
        "mixer/out": ("attn_output.weight", "D (H K) -> H K D"),
        "mixer/query_bias": ("attn_q.bias", "(H K) -> H K"),
        "mixer/key_bias": ("attn_k.bias", "(G K) -> G K"),
        "mixer/value_bias": ("attn_v.bias", "(G K) -> G K"),
        "mixer/out_bias": ("attn_output.bias", "D"),
        "mixer/query_scale": ("attn_q_norm.weight", "K"),
        "mixer/key_scale": ("attn_k_norm.weight", "K"),
        "mixer/queries_scale": ("attn_q_norm.weight", "(H K) -> H K"),
        "mixer/keys_scale": ("attn_k_norm.weight", "(G K) -> G K"),
        "mlp_norm/scale": ("ffn_norm.weight", "D"),
        "mlp/gate": ("ffn_gate.weight", "F D -> D F"),
        "mlp/up": ("ffn_up.weight", "F D -> D F"),
        "mlp/down": ("ffn_down.weight", "D F -> F D"),
        "mlp/router": ("ffn_gate_inp.weight", "E D -> D E"),
        "mlp/expert_gate": ("ffn_gate_exps.weight", "E X D -> E D X"),
        "mlp/expert_up": ("ffn_up_exps.weight", "E X D -> E D X"),
        "mlp/expert_down": ("ffn_down_exps.weight", "E D X -> E X D"),
    }
)
# Rows of queries and keys in the order of neighbouring pairs, as rotary positions were first written down.
LLAMA = QWEN | _block(
    {
        "mixer/query": ("attn_q.weight", "(H k 2) D -> D H (2 k)"),
        "mixer/key": ("attn_k.weight", "(G k 2) D -> D G (2 k)"),
        "mixer/query_bias": ("attn_q.bias", "(H k 2) -> H (2 k)"),
        "mixer/key_bias": ("attn_k.bias", "(G k 2) -> G (2 k)"),
    }
)
OLMO2 = QWEN | _block(
    {
        "mixer_norm/scale": ("post_attention_norm.weight", "D"),
        "mlp_norm/scale": ("post_ffw_norm.weight", "D"),
    }
)
# Gains are written as scales.
GEMMA = QWEN | {
    ours.replace("scale", "gain"): Entry(entry.name, entry.pattern, more=1.0)
    for ours, entry in (
        QWEN
        | _block(
            {
                "mixer_out_norm/scale": ("post_attention_norm.weight", "D"),
                "mlp_out_norm/scale": ("post_ffw_norm.weight", "D"),
            }
        )
    ).items()
    if ours.endswith("scale")
}
GPT2 = (
    QWEN
    | {
        "embed/position": Entry("position_embd.weight", "T D"),
        "norm/shift": Entry("output_norm.bias", "D"),
    }
    | _block(
        {
            "mixer_norm/shift": ("attn_norm.bias", "D"),
            "mlp_norm/shift": ("ffn_norm.bias", "D"),
            "mlp/up_bias": ("ffn_up.bias", "F"),
            "mlp/down_bias": ("ffn_down.bias", "D"),
        }
    )
)
for _part, _name in enumerate(("query", "key", "value")):  # side by side
    _where = {"part": (_part, 3), "axis": 0}
    GPT2[f"mixer/{_name}"] = Entry("blk.{layer}.attn_qkv.weight", "(H K) D -> D H K", **_where)
    GPT2[f"mixer/{_name}_bias"] = Entry("blk.{layer}.attn_qkv.bias", "(H K) -> H K", **_where)

# ---- keys: GGUF's (after the architecture's name) -> config.json's ----

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_GPT2 = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
}


class Architecture(NamedTuple):
    """One of GGUF's architectures as a family of families.py; fixed: what llama.cpp takes for granted."""

    name: str
    family: str
    tensors: Table
    keys: Mapping[str, str]
    fixed: Mapping[str, object] = {}


ARCHITECTURES = (
    Architecture("llama", "llama", LLAMA, _SIZES, {"attention_bias": False, "mlp_bias": False}),
    Architecture(
        "llama",
        "mixtral",
        LLAMA,
        _SIZES | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    Architecture("qwen2", "qwen2", QWEN, _SIZES),
    Architecture("qwen3", "qwen3", QWEN, _SIZES),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        QWEN,
        _SIZES | _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        {"norm_topk_prob": True},
    ),
    Architecture("olmo2", "olmo2", OLMO2, _SIZES),
    Architecture("olmoe", "olmoe", QWEN, _SIZES | _EXPERTS, {"norm_topk_prob": False}),
    Architecture("smollm3", "smollm3", LLAMA, _SIZES),
    Architecture("gemma", "gemma", GEMMA, _SIZES),
    Architecture("gemma2", "gemma2", GEMMA, _SIZES | _WINDOW | _CAPS),
    Architecture(
        "gemma3",
        "gemma3_text",
        GEMMA,
        _SIZES | _WINDOW | {"rope.freq_base_swa": "rope_local_base_freq"},
    ),
    Architecture("gpt2", "gpt2", GPT2, _GPT2),
)
