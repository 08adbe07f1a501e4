"""The families of models that other tools know: a table of tensors and a list of features each.

A family is a `Transformer` with some fields fixed. To save a model, the first family is taken whose config
says all of it; so what was trained here is a Llama, a GPT-2 or whatever else its options make it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax import config as configs
from llm_jax.config import UserError
from llm_jax.interop import features
from llm_jax.interop.features import Feature, Json
from llm_jax.interop.huggingface_names import GEMMA, GEMMA2, GPT2, LLAMA, MIXTRAL, OLMO2, OLMOE
from llm_jax.interop.layouts import Table
from llm_jax.models.experts import Experts
from llm_jax.models.parametrization import Standard
from llm_jax.models.transformer import Attending, LayerNorm, RMSNorm, Transformer


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: what it is called, its tensors, what is fixed in it, and what its config says.

    defaults: keys that a config.json may leave out. ignored: tensors that hold no parameter (a regular
    expression). prefix: what the names of a file without a head lack.
    """

    name: str
    architecture: str
    tensors: Table
    features: tuple[Feature, ...]
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    ignored: str = r".*\.rotary_emb\.inv_freq"
    prefix: str = "model."

    def read(self, json: Json) -> Transformer:
        """The model that a config.json describes; raises UserError for what isn't known here."""
        json = {**self.defaults, **json}
        _refuse(json)
        fields = dict(self.fixed)
        with features.sound(f"config.json of a {self.name}"):
            for feature in self.features:
                fields |= feature.read(json)
        config = Transformer()
        for path, value in fields.items():
            config = configs.replace(config, path, value)
        configs.check(config, "config.json: model")
        return canonical(config)

    def write(self, config: Transformer) -> Json:
        """The keys of config.json for a model, if the family can be it."""
        said = {"architectures": [self.architecture], "model_type": self.name}
        for feature in self.features:
            said |= feature.write(config)
        return said


_LLAMA = (features.SIZES, features.ROPE, features.activation(features.GATED, "hidden_act"))
_QWEN = (*_LLAMA, features.WINDOWS)
_GEMMA = (
    features.SIZES,
    features.activation(features.GATED | {"gelu": "geglu"}, "hidden_activation", "hidden_act"),
    features.ROOT_OF_WIDTH,
)
_GEMMA2 = (*_GEMMA, features.WINDOWS, features.CAPS, features.QUERY_SCALE)
_GAINS = {"norm": RMSNorm(gain=True)}
_HEADS_NORMED = {"qk_norm": True, "attention.norm_over": "heads"}
_QWEN_MOE = features.experts("num_experts", "moe_intermediate_size")
_QWEN_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28} | {
    "rms_norm_eps": 1e-6
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA,
            (*_LLAMA, features.biases(mlp=True)),
            defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA,
            (*_LLAMA, features.ONE_WINDOW),
            defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": False},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            LLAMA,
            _QWEN,
            fixed={"attention.bias": "qkv"},
            defaults={**_QWEN_DEFAULTS, "tie_word_embeddings": False},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            LLAMA,
            (*_QWEN, features.biases(mlp=False)),
            fixed={"qk_norm": True},
            defaults={**_QWEN_DEFAULTS, "head_dim": 128, "tie_word_embeddings": False},
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            LLAMA,
            (*_LLAMA, features.biases(mlp=True), features.NO_ROPE, features.WINDOWS),
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 2e6, "tie_word_embeddings": True}
            | {"use_sliding_window": False},
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            OLMO2,
            (*_LLAMA, features.biases(mlp=False)),
            fixed={**_HEADS_NORMED, "norm_position": "output"},
            defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            GEMMA,
            (*_GEMMA, features.ROPE, features.biases(mlp=False)),
            fixed=_GAINS,
            defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            GEMMA2,
            (*_GEMMA2, features.ROPE, features.biases(mlp=False)),
            fixed={**_GAINS, "norm_position": "sandwich"},
            defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True}
            | {"sliding_window": 4096, "sliding_window_pattern": 2, "query_pre_attn_scalar": 256}
            | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            GEMMA2,
            (*_GEMMA2, features.TWO_ROPES, features.biases(mlp=False)),
            fixed={**_GAINS, "norm_position": "sandwich", "qk_norm": True},
            defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True}
            | {"sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            MIXTRAL,
            (*_LLAMA, features.ONE_WINDOW, features.experts("num_local_experts", "intermediate_size", None)),
            fixed={"experts": Experts()},
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False}
            | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            OLMOE,
            (*_LLAMA, features.biases(mlp=False), features.experts("num_experts", "intermediate_size")),
            fixed={**_HEADS_NORMED, "experts": Experts()},
            defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
            | {"norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            OLMOE,
            (*_LLAMA, features.biases(mlp=False), features.ONE_WINDOW, _QWEN_MOE, features.SPARSE_LAYERS),
            fixed={"qk_norm": True, "experts": Experts()},
            defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": False}
            | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
            | {"use_sliding_window": False, "sliding_window": 4096, "head_dim": None},
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            GPT2,
            (
                features.GPT2_SIZES,
                features.LEARNED,
                features.activation(features.PLAIN, "activation_function"),
            ),
            fixed={"norm": LayerNorm(), "bias": True},
            defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
            | {"activation_function": "gelu_new"},
            ignored=r".*\.attn\.(masked_)?bias",
            prefix="transformer.",
        ),
    )
}

# What would change the mathematics and isn't known here: key -> the values that leave it as it is.
_HARMLESS = {
    "clip_qkv": (None,),
    "use_bidirectional_attention": (None, False),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


def _refuse(json: Json) -> None:
    for key, harmless in _HARMLESS.items():
        if json.get(key, harmless[0]) not in harmless:
            raise UserError(f"config.json: {key}={json[key]!r} is not known here, only {harmless[0]!r}")


def of(json: Json) -> Family:
    """The family of a config.json; raises UserError, with those that are known, for any other."""
    named = json.get("architectures") or json.get("model_type")
    named = named if isinstance(named, list) else [named]
    for family in FAMILIES.values():
        if family.architecture in named or family.name in named:
            return family
    known = ", ".join(family.architecture for family in FAMILIES.values())
    images = " for text and images, only for text" if "vision_config" in json else ""
    raise UserError(f"no architecture {named[0]!r} here{images}; there are: {known}")


def canonical(config: Transformer) -> Transformer:
    """The same model with its defaults written out and patterns as short as they can be."""
    rotations = _shortest(config, config.rotary) if config.rotations else ()
    return dataclasses.replace(
        config,
        kv_heads=config.key_value_heads,
        head_width=config.size_of_head,
        mlp_width=config.size_of_mlp,
        windows=_shortest(config, config.window),
        rotations=() if rotations == (config.positions,) else rotations,
        attention=_plain_attention(config),
        experts=config.experts
        and dataclasses.replace(
            config.experts,
            width=config.size_of_expert,
            pattern=_shortest(config, config.has_experts),
        ),
    )


def _shortest(config: Transformer, of_layer: Callable[[int], Any]) -> tuple[Any, ...]:
    return features.shortest([of_layer(layer) for layer in range(config.layers)])


def _plain_attention(config: Transformer) -> Attending:
    attention = config.attention
    usual = "all" if config.bias else "none"
    bias = "as_model" if config.attention_bias == usual else attention.bias
    scale = None if attention.scale == config.size_of_head**-0.5 else attention.scale
    norm_over = attention.norm_over if config.qk_norm else "head"
    return dataclasses.replace(attention, bias=bias, scale=scale, norm_over=norm_over)


def fitting(config: Transformer, name: str | None = None) -> tuple[Family, Json]:
    """The family that a model can be saved as, by default the first, and its config.json.

    Raises UserError that says what the nearest family can't.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(f"no family {name!r}; {configs.nearest(name, FAMILIES)}")
    if not isinstance(config.parametrization, Standard):
        raise UserError(
            f"model.parametrization={config.parametrization.kind}: no family multiplies as it does"
        )
    same = dataclasses.replace(canonical(config), dropout=0.0, dtype="float32")
    unlike = {}
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        json = family.write(same)
        try:
            read = family.read(json)
        except UserError as error:
            unlike[family.name] = [str(error)]
            continue
        fields = [field.name for field in dataclasses.fields(same)]
        different = [field for field in fields if getattr(read, field) != getattr(same, field)]
        if not different:
            return family, json
        unlike[family.name] = [f"model.{field}={getattr(config, field)}" for field in different]
    nearest = min(unlike, key=lambda name: len(unlike[name]))
    raise UserError(f"no known family is this model; {nearest} differs in {', '.join(unlike[nearest])}")
