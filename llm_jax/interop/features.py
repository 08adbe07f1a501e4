"""What a `config.json` says and the fields of a `Transformer` that say the same, feature by feature.

A feature is a pair of functions: `read(json)` gives fields by their path, `write(config)` the keys. Families
are lists of features (families.py). Old and new spellings of a key are read, and both are written:
transformers 5 knows `rope_parameters`, older readers `rope_theta` and `rope_scaling`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.config import UserError
from llm_jax.models.positions import Learned, Linear, Llama3, NoStretch, Rotary, Stretch, Yarn
from llm_jax.models.transformer import Transformer

Json = dict[str, Any]
Fields = dict[str, Any]  # dotted path of a Transformer's field -> its value


@contextlib.contextmanager
def sound(what: str) -> Iterator[None]:
    """Raises UserError where the reading of a damaged file fails; what: its name in that line."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what} has no {error}") from None
    except Exception as error:  # some libraries raise bare ones
        raise UserError(f"{what} is damaged: {' '.join(str(error).split())}") from None


class Feature(NamedTuple):
    """One thing that a config says."""

    read: Callable[[Json], Fields]
    write: Callable[[Transformer], Json]


def renamed(names: Mapping[str, str], optional: Sequence[str] = ()) -> Feature:
    """Keys that are fields under another name; optional: those that may be left out."""

    def read(json: Json) -> Fields:
        return {path: json[key] for key, path in names.items() if key in json or key not in optional}

    def write(config: Transformer) -> Json:
        said = {}
        for key, path in names.items():
            *parents, field = path.split(".")
            holder = functools.reduce(getattr, parents, config)
            if hasattr(holder, field):  # not so for the experts of a model without
                said[key] = getattr(holder, field)
        return said

    return Feature(read, write)


def shortest(pattern: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest beginning of a pattern that repeats to it."""
    for length in range(1, len(pattern)):
        if all(item == pattern[i % length] for i, item in enumerate(pattern)):
            return tuple(pattern[:length])
    return tuple(pattern)


# ---- sizes ----

SIZES = renamed(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_width",
        "intermediate_size": "mlp_width",
        "vocab_size": "vocabulary",
        "tie_word_embeddings": "tied",
        "rms_norm_eps": "norm.epsilon",
    },
    optional=("num_key_value_heads", "head_dim"),
)

GPT2_SIZES = renamed(
    {
        "n_layer": "layers",
        "n_embd": "width",
        "n_head": "heads",
        "n_inner": "mlp_width",
        "vocab_size": "vocabulary",
        "layer_norm_epsilon": "norm.epsilon",
        "tie_word_embeddings": "tied",
    },
    optional=("n_inner",),
)

LEARNED = Feature(
    lambda json: {"positions": Learned(json["n_positions"])},
    lambda config: {"n_positions": getattr(config.positions, "length", 0)},
)

# Names of activations in a config -> ours; what is written is the first.
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
PLAIN |= {"relu": "relu", "relu2": "relu2"}


def activation(known: Mapping[str, str], *keys: str) -> Feature:
    """The activation by a name that is `known`, under the first of `keys` that says one."""

    def read(json: Json) -> Fields:
        name = next((json[key] for key in keys if json.get(key)), None)
        if name not in known:
            raise UserError(f"{keys[0]}={name!r} of config.json is not known here; {', '.join(known)} are")
        return {"activation": known[name]}

    def write(config: Transformer) -> Json:
        names = [name for name, ours in known.items() if ours == config.activation]
        return dict.fromkeys(keys, (names or list(known))[0])

    return Feature(read, write)


# ---- biases ----


def biases(mlp: bool) -> Feature:
    """Biases of attention; mlp: the MLP's have a key of their own."""

    def read(json: Json) -> Fields:
        attention = "all" if json.get("attention_bias", False) else "none"
        return {"bias": mlp and json.get("mlp_bias", False), "attention.bias": attention}

    def write(config: Transformer) -> Json:
        said = {"attention_bias": config.attention_bias == "all"}
        return said | ({"mlp_bias": config.bias} if mlp else {})

    return Feature(read, write)


# ---- rotary positions ----


def _read_stretch(rope: Json, json: Json) -> Stretch:
    kind = rope.get("rope_type", rope.get("type", "default"))
    longest = json.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings", longest)
    if kind == "default":
        return NoStretch()
    if kind == "linear":
        return Linear(rope["factor"])
    if kind == "llama3":
        return Llama3(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind == "yarn":
        factor, magnitude = rope.get("factor") or longest / original, rope.get("attention_factor")
        if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            log = 0.1 * math.log(factor)
            magnitude = (1 + rope["mscale"] * log) / (1 + rope["mscale_all_dim"] * log)
        ends = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        return Yarn(factor, *ends, original, magnitude, rope.get("truncate", True))
    raise UserError(f"rope_type={kind!r} of config.json is not known here; default, linear, llama3, yarn are")


def _write_stretch(stretch: Stretch) -> Json:
    said: Json = {"rope_type": "default" if stretch.kind == "none" else stretch.kind}
    if not isinstance(stretch, NoStretch):
        said["factor"] = stretch.factor
    if isinstance(stretch, Llama3 | Yarn):
        said["original_max_position_embeddings"] = stretch.original
    if isinstance(stretch, Llama3):
        said |= {"low_freq_factor": stretch.low, "high_freq_factor": stretch.high}
    if isinstance(stretch, Yarn):
        said |= {"beta_fast": stretch.fast, "beta_slow": stretch.slow, "truncate": stretch.whole}
        said |= {} if stretch.magnitude is None else {"attention_factor": stretch.magnitude}
    return said


def _read_rope(rope: Json, json: Json, theta: float) -> Rotary:
    if rope.get("partial_rotary_factor", json.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("partial_rotary_factor of config.json: heads are turned as a whole here")
    return Rotary(rope.get("rope_theta", theta), _read_stretch(rope, json))


def _write_rope(rotary: Rotary) -> Json:
    return {"rope_theta": rotary.theta, **_write_stretch(rotary.stretch)}


def _read_one_rope(json: Json) -> Fields:
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    return {"positions": _read_rope(rope, json, json.get("rope_theta", 10_000.0))}


def _write_one_rope(config: Transformer) -> Json:
    if not isinstance(config.positions, Rotary):
        return {}
    said = _write_rope(config.positions)
    scaling = None if said["rope_type"] == "default" else said
    return {"rope_parameters": said, "rope_theta": said["rope_theta"], "rope_scaling": scaling}


ROPE = Feature(_read_one_rope, _write_one_rope)


def _read_two_ropes(json: Json) -> Fields:
    ropes = json.get("rope_parameters") or {}
    whole = {**(ropes.get("full_attention") or {}), **(json.get("rope_scaling") or {})}
    positions = _read_rope(whole, json, json.get("rope_theta", 1e6))
    local = _read_rope(ropes.get("sliding_attention") or {}, json, json.get("rope_local_base_freq", 1e4))
    kinds = _layer_types(json)
    return {
        "positions": positions,
        "rotations": shortest([local if kind == "sliding_attention" else positions for kind in kinds]),
    }


def _write_two_ropes(config: Transformer) -> Json:
    if not isinstance(config.positions, Rotary):
        return {}
    said = _write_one_rope(config)
    local = [config.rotary(layer) for layer in range(config.layers) if config.window(layer) is not None]
    theta = local[0].theta if local and local[0] else 1e4
    both = {
        "full_attention": said["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }
    return said | {"rope_parameters": both, "rope_local_base_freq": theta}


TWO_ROPES = Feature(_read_two_ropes, _write_two_ropes)


def _read_no_rope(json: Json) -> Fields:
    turned = json.get("no_rope_layers")  # 0: the layer has none
    if turned is None:
        every = json.get("no_rope_layer_interval", 4)
        turned = [(layer + 1) % every != 0 for layer in range(json["num_hidden_layers"])]
    positions = _read_one_rope(json)["positions"]
    return {"rotations": shortest([positions if one else None for one in turned])}


NO_ROPE = Feature(
    _read_no_rope,
    lambda config: {"no_rope_layers": [int(config.rotary(i) is not None) for i in range(config.layers)]},
)

# ---- windows ----

ONE_WINDOW = Feature(
    lambda json: {"windows": (json["sliding_window"] if json.get("use_sliding_window", True) else None,)},
    lambda config: {
        "sliding_window": config.windows[0],
        "use_sliding_window": config.windows[0] is not None,
    },
)


def _layer_types(json: Json) -> list[str]:
    """For each layer full_attention or sliding_attention, as written or by the rules of older configs."""
    layers = json["num_hidden_layers"]
    if kinds := json.get("layer_types"):
        known = {"full_attention", "sliding_attention"}
        if len(kinds) != layers or not known.issuperset(kinds):
            raise UserError(
                f"layer_types of config.json: {layers} of {', '.join(sorted(known))} go with its "
                f"num_hidden_layers, not {len(kinds)} of {', '.join(sorted(set(map(str, kinds))))}"
            )
        return kinds
    if "max_window_layers" in json:  # Qwen: the last ones
        sliding = [layer >= json["max_window_layers"] for layer in range(layers)]
    elif "use_sliding_window" in json:  # SmolLM 3: those without rotary positions
        sliding = [rotary is None for rotary in _read_no_rope(json)["rotations"]] * layers
    else:  # Gemma: all but every n-th
        sliding = [(layer + 1) % json["sliding_window_pattern"] != 0 for layer in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in sliding[:layers]]


def _read_windows(json: Json) -> Fields:
    if not json.get("use_sliding_window", True):
        return {"windows": (None,)}
    window = json.get("sliding_window")
    return {"windows": shortest([window if k == "sliding_attention" else None for k in _layer_types(json)])}


def _write_windows(config: Transformer) -> Json:
    windows = [config.window(layer) for layer in range(config.layers)]
    window = next((w for w in windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    last = windows.index(window) if window else config.layers
    return {"sliding_window": window, "layer_types": types} | {
        "use_sliding_window": window is not None,
        "max_window_layers": last,
    }


WINDOWS = Feature(_read_windows, _write_windows)

# ---- scores ----

_CAPS = {"attn_logit_softcapping": "attention.softcap", "final_logit_softcapping": "softcap"}
CAPS = renamed(_CAPS, optional=tuple(_CAPS))
QUERY_SCALE = Feature(
    lambda json: {"attention.scale": json["query_pre_attn_scalar"] ** -0.5},
    lambda config: {
        "query_pre_attn_scalar": _whole((config.attention.scale or config.size_of_head**-0.5) ** -2)
    },
)
ROOT_OF_WIDTH = Feature(lambda json: {"multiplier": float(json["hidden_size"]) ** 0.5}, lambda config: {})


def _whole(number: float) -> float | int:
    return round(number) if abs(number - round(number)) < 1e-6 else number


# ---- experts ----


def experts(count: str, width: str, renormalise: str | None = "norm_topk_prob") -> Feature:
    """Top-k routing under the family's names of the fields; renormalise: None if it always does."""
    names = {count: "experts.count", "num_local_experts": "experts.count"}  # the newer name prevails
    names |= {width: "experts.width", "num_experts_per_tok": "experts.active"}
    names |= {renormalise: "experts.renormalise"} if renormalise else {}
    return renamed(names, optional=("num_local_experts",))


def _read_sparse(json: Json) -> Fields:
    dense, step = json.get("mlp_only_layers") or [], json.get("decoder_sparse_step", 1)
    layers = range(json["num_hidden_layers"])
    return {"experts.pattern": shortest([i not in dense and (i + 1) % step == 0 for i in layers])}


SPARSE_LAYERS = Feature(
    _read_sparse,
    lambda config: {
        "mlp_only_layers": [i for i in range(config.layers) if not config.has_experts(i)],
        "decoder_sparse_step": 1,
    },
)
