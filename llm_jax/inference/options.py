"""The flags that score, generate and chat share."""

from collections.abc import Sequence

from absl import flags
from jax.sharding import Mesh

from llm_jax.config import UserError
from llm_jax.inference.opening import Opened, open_model
from llm_jax.inference.sampling import Sampling
from llm_jax.sharding import MeshConfig, make_mesh

AXES = ("data", "fsdp", "tensor")


def define_model(dtypes: Sequence[str] = ("float32", "bfloat16", "int8")) -> None:
    """Defines --model, --dtype and --mesh."""
    flags.DEFINE_string("model", None, "a directory in Hugging Face's format, a .gguf file or a run's folder")
    flags.DEFINE_enum("dtype", None, dtypes, "of weights; default: as stored")
    flags.DEFINE_list("mesh", [], "how devices share the model and the work: data=2,fsdp=4,tensor=1")


def opened(path: str) -> Opened:
    """The model at `path` as --dtype and --mesh say."""
    return open_model(path, flags.FLAGS.dtype, mesh())


def mesh() -> Mesh | None:
    """What --mesh says."""
    sizes = {"data": "1"} if flags.FLAGS.mesh else {}
    for item in flags.FLAGS.mesh:
        name, _, size = item.partition("=")
        if name not in AXES or not size.isdecimal():
            raise UserError(f"--mesh: {name!r} is not data=N, fsdp=N or tensor=N")
        sizes[name] = size
    return make_mesh(MeshConfig(**{name: int(size) for name, size in sizes.items()})) if sizes else None


def define(max_tokens: int = 128) -> None:
    """Defines those of a model, of where an answer ends, and one for each field of `Sampling`."""
    define_model()
    flags.DEFINE_integer("max_tokens", max_tokens, "the longest answer, in tokens")
    flags.DEFINE_multi_string("stop", [], "a text that ends the answer; may be given several times")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token")
    flags.DEFINE_integer("top_k", 0, "sample from so many tokens at most (0: all)")
    flags.DEFINE_float("top_p", 1.0, "sample from the fewest tokens that together have this probability")
    flags.DEFINE_float("min_p", 0.0, "sample from tokens at least so many times as probable as the first")
    flags.DEFINE_float("repetition_penalty", 1.0, "divides the positive logits of tokens that were there")
    flags.DEFINE_list("logit_bias", [], "ID:BIAS, separated by commas")
    flags.DEFINE_integer("seed", 0, "the same seed gives the same samples")


def check(**least: int) -> None:
    """Raises UserError for a flag below the least that it may be, and for an empty stop text."""
    for name, low in {"max_tokens": 1, **least}.items():
        if flags.FLAGS[name].value < low:
            raise UserError(f"{name} is {flags.FLAGS[name].value}; it is at least {low}")
    if "" in flags.FLAGS.stop:
        raise UserError("--stop: a stop text is empty")


def sampling() -> Sampling:
    """What the flags ask for."""
    f = flags.FLAGS
    bias = {}
    for item in f.logit_bias:
        token, _, value = item.partition(":")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise UserError(f"--logit_bias: {item!r} is not ID:BIAS, such as 42:-100") from None
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(f, name) for name in names}, logit_bias=bias)
