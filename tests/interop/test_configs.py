"""A config.json means the same in its older and newer spellings, and what transformers takes it to mean."""

import json

import pytest
import reference
from test_huggingface import changed, loaded

from llm_jax.interop import families, huggingface


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "llama",
            {
                "rope_theta": 1000.0,
                "rope_scaling": {k: v for k, v in reference.LLAMA3.items() if k != "rope_theta"},
            },
        ),
        (
            "gemma3",
            {
                "rope_theta": 1000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "layer_types": None,
                "sliding_window_pattern": 3,
            },
        ),
        ("qwen2", {"layer_types": None, "rope_theta": 10_000}),
        ("smollm3", {"no_rope_layers": None, "layer_types": None, "rope_theta": 2e6}),
    ],
)
def test_configs_in_the_older_spelling_mean_the_same(name, keys, tmp_path):
    folder = changed(tmp_path, name, rope_parameters=None, **keys)
    facts = json.loads((folder / "config.json").read_text())
    assert families.of(facts).read(facts) == loaded(name).config


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_configs_written_here_mean_the_same_to_older_readers(name, tmp_path):
    config, params, _ = loaded(name)
    huggingface.save(tmp_path / "out", config, params)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["dtype"] == facts["torch_dtype"] == "float32" and facts["rope_scaling"]
    older = {key: value for key, value in facts.items() if key not in ("rope_parameters", "dtype")}
    assert families.of(older).read(older) == config


# What config.json of released models says, scaled down: keys of older readers, nulls, keys without a meaning.
V4 = {"vocab_size": 37, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2} | {
    "num_hidden_layers": 7,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
STRETCH = {k: v for k, v in reference.LLAMA3.items() if k != "rope_theta"}
LONG = {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 10}
QWEN = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 7}
LOCAL = {"sliding_window": 5, "query_pre_attn_scalar": 7, "cache_implementation": "hybrid"}
LOCAL |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
MIXED = {"num_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
RELEASED = {
    "llama-2": {"model_type": "llama", "num_key_value_heads": 6, "pretraining_tp": 2},
    "llama-3.1": {"model_type": "llama", "rope_scaling": STRETCH, "mlp_bias": False, "head_dim": None},
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral-nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 6},
    "qwen-2": {"model_type": "qwen2", **QWEN, "sliding_window": 32, "tie_word_embeddings": True},
    "qwen-2-windows": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
    "qwen-2.5-long": {"model_type": "qwen2", **QWEN, "use_mrope": False, "rope_scaling": LONG},
    "qwen-3": {"model_type": "qwen3", **QWEN, "head_dim": 10, "attention_bias": True},
    "gemma": {"model_type": "gemma", **GELU, "hidden_activation": None, "tie_word_embeddings": True},
    "gemma-2": {"model_type": "gemma2", **GELU, **LOCAL, "sliding_window_size": 5}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma-3": {"model_type": "gemma3_text", **GELU, **LOCAL, "rope_local_base_freq": 100}
    | {"sliding_window_pattern": 6},
    "gemma-3-270m": {"model_type": "gemma3_text", **GELU, **LOCAL, "rope_local_base_freq": 100.0}
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]}
    | {"_sliding_window_pattern": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo-2": {"model_type": "olmo2"},
    "smollm-3": {"model_type": "smollm3", **QWEN, "no_rope_layers": [1, 1, 1, 0, 1, 1, 1]}
    | {"layer_types": ["full_attention"] * 7, "no_rope_layer_interval": 4, "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 5}
    | {"num_experts_per_tok": 2, "output_router_logits": False},
    "qwen-3-moe": {"model_type": "qwen3_moe", **QWEN, **MIXED, "moe_intermediate_size": 14, "head_dim": 10}
    | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "olmoe": {"model_type": "olmoe", **MIXED, "clip_qkv": None, "norm_topk_prob": False},
}
GPT2 = {"vocab_size": 37, "n_positions": 64, "n_ctx": 64, "n_embd": 24, "n_layer": 2, "n_head": 6}
GPT2 |= {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "summary_type": "cls_index", "n_inner": None}


@pytest.mark.parametrize("name", [*RELEASED, "gpt-2"])
def test_the_configs_of_released_models_mean_what_transformers_takes_them_to_mean(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    facts = GPT2 if name == "gpt-2" else V4 | RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert "rope_theta" not in theirs or name == "gpt-2"  # it says everything in its newer keys
    assert families.of(facts).read(facts) == families.of(theirs).read(theirs)
