"""GGUF files, which llama.cpp and Ollama run: read in any quantisation, written in F32, BF16, F16 and Q8_0.

config, params, tokenizer = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")
gguf.save("model.gguf", config, params, tokenizer, kind="Q8_0")
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from jax.sharding import Mesh

from llm_jax.config import UserError
from llm_jax.interop import families, gguf_tokenizer, tensors
from llm_jax.interop import tokenizer as tokenizers
from llm_jax.interop.features import Json, sound
from llm_jax.interop.gguf_names import ARCHITECTURES, Architecture
from llm_jax.interop.huggingface import Described, Loaded
from llm_jax.interop.layouts import plan, sizes_of
from llm_jax.interop.tokenizer import Portable
from llm_jax.models import Params
from llm_jax.models.positions import Llama3, Rotary, frequencies
from llm_jax.models.transformer import Transformer

LARGE = {"gemma2": 46, "gemma3_text": 62}  # layers by which llama.cpp knows Gemma's 27B models
BLOCK = 32  # values that share a scale in Q8_0
KINDS = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # and their general.file_type
WIDE = ("position_embd.weight",)  # matrices that stay F32, as routers do
# What each rotary frequency is divided by, Llama 3's three bands; llama.cpp reads it for "llama" alone.
STRETCHED = "rope_freqs.weight"
ORIGINAL = "rope.scaling.original_context_length"


def load(path: str | pathlib.Path, mesh: Mesh | None = None) -> Loaded:
    """The model in a file, dequantised to float32 on the mesh (by default one device) tensor by tensor.

    Raises UserError for a damaged file, an architecture, quantisation or tokenizer that isn't known, and
    tensors that don't fit the metadata.
    """
    return describe(path).load(mesh)


def describe(path: str | pathlib.Path) -> Described:
    """What `load` finds, but for the parameters."""
    file = File(pathlib.Path(os.path.expanduser(path)))
    architecture, config = _config_of(file)
    tensors.shapes(file, architecture.tensors, config)
    read = functools.partial(tensors.load, file, architecture.tensors, config)
    return Described(config, read, _tokenizer_of(file))


def context(path: str | pathlib.Path) -> int | None:
    """How many tokens the model in a file was made for, if it says so."""
    return File(pathlib.Path(os.path.expanduser(path))).context


def save(
    path: str | pathlib.Path,
    config: Transformer,
    params: Params,
    tokenizer: Any,
    kind: str = "F32",
) -> None:
    """Writes a file that `load` and llama.cpp read; it must not exist.

    tokenizer: a `Portable`, or a codec of `data/tokenizers.py`. kind: how matrices are written; with Q8_0
    those whose rows aren't a multiple of 32 are F16, and vectors always stay F32. Raises UserError for a
    model or a tokenizer that llama.cpp hasn't.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r} of GGUF; there are: {', '.join(KINDS)}")
    if tokenizer is None:
        raise UserError("a GGUF file holds a tokenizer, and this model has none")
    portable = tokenizers.of(tokenizer)
    architecture, facts = _facts_of(config, portable.context or getattr(config.positions, "length", 2048))
    facts |= {"general.file_type": KINDS[kind], "general.alignment": 32}
    facts |= gguf_tokenizer.write(portable, config.vocabulary)
    with tensors.whole(pathlib.Path(os.path.expanduser(path))) as file:
        writer = GGUFWriter(file, architecture.name)
        _write(writer, facts, architecture, config, params, kind)
        writer.close()


def _write(
    writer: GGUFWriter,
    facts: Json,
    architecture: Architecture,
    config: Transformer,
    params: Params,
    kind: str,
) -> None:
    """Metadata, what is said of the tensors, and the tensors one by one."""
    for key, value in facts.items():
        _add(writer, key, value)
    sizes = sizes_of(config)
    extra = {STRETCHED: _divisors(config)} if _is_llama3(config) else {}
    for name, pieces in plan(architecture.tensors, config, config.build()).items():
        shape = pieces[0].entry.shape(sizes)
        type_ = _type_of(name, shape, kind)
        dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(type_.name, np.dtype(np.uint8))
        stored = shape if dtype != np.uint8 else quants.quant_shape_to_byte_shape(shape, type_)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=type_)
    for name, array in extra.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in tensors.save(params, architecture.tensors, config):
        writer.write_tensor_data(_encode(array.astype(np.float32), _type_of(name, array.shape, kind)))
    for array in extra.values():
        writer.write_tensor_data(array)


class File:
    """A GGUF file as tensors by name and plain metadata."""

    def __init__(self, path: pathlib.Path) -> None:
        self.source = str(path)
        if not path.is_file():
            raise UserError(f"no file {path}")
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file")
        try:
            reader = GGUFReader(path)
            self.facts = {name: _plain(field.contents()) for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(f"{path}: not a whole GGUF file: {error}") from None
        if (parts := self.facts.get("split.count", 1)) > 1:
            raise UserError(
                f"{path} is one of {parts} parts of a model: make them one, with llama-gguf-split --merge"
            )
        self.name = str(self.facts.get("general.architecture"))
        self.context = self.facts.get(f"{self.name}.context_length")
        self.divisors = self._tensors.pop(STRETCHED, None) if self.name == "llama" else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            array = quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes()[name])
            return array.copy() if tensor.tensor_type.name == "F32" else array  # else it is the file's memory
        except NotImplementedError:
            raise UserError(
                f"{self.source}: {name} is {tensor.tensor_type.name}, which the gguf package can't dequantise"
            ) from None


# ---- metadata ----


def _config_of(file: File) -> tuple[Architecture, Transformer]:
    """The architecture and the model that a file's metadata describe."""
    shapes = file.shapes()
    facts = {key.removeprefix(f"{file.name}."): value for key, value in file.facts.items()}
    sparse = "expert_count" in facts
    for architecture in ARCHITECTURES:
        if architecture.name == file.name and ("expert_count" in architecture.keys) == sparse:
            break
    else:
        known = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES))
        raise UserError(f"{file.source}: no architecture {file.name!r} here; there are: {known}")
    if "token_embd.weight" in shapes:
        facts["vocab_size"] = shapes["token_embd.weight"][0]
    facts["tied"] = "output.weight" not in shapes
    with sound(f"{file.source}: metadata"):
        config = _read(architecture, facts)
    if file.divisors is not None:
        original = facts.get(ORIGINAL, Llama3.original)
        config = _stretched(config, np.asarray(file.divisors.data, np.float32), original, file.source)
    return architecture, config


def _tokenizer_of(file: File) -> Portable | None:
    with sound(f"{file.source}: tokenizer"):
        return gguf_tokenizer.read(file.facts, file.context)


def _read(architecture: Architecture, facts: Json) -> Transformer:
    """The model by metadata whose keys are without the architecture's name."""
    json = {theirs: facts[key] for key, theirs in architecture.keys.items() if key in facts}
    json |= {"tie_word_embeddings": facts["tied"], **architecture.fixed}
    json |= {"hidden_act": "silu"} if "gemma" not in architecture.name else {"hidden_act": "gelu"}
    if facts.get("rope.scaling.type", "none") != "none":
        json["rope_scaling"] = {"rope_type": facts["rope.scaling.type"]} | {
            theirs: facts[key]
            for key, theirs in {
                "rope.scaling.factor": "factor",
                ORIGINAL: "original_max_position_embeddings",
            }.items()
            if key in facts
        }
    even = facts["embedding_length"] // facts["attention.head_count"]
    json = {"head_dim": even, "rope_theta": 10_000.0} | json
    if (turned := facts.get("rope.dimension_count", json["head_dim"])) != json["head_dim"]:
        raise UserError(f"rope.dimension_count={turned}: heads, of {json['head_dim']}, turn as a whole here")
    if (factor := facts.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise UserError(f"rope.scaling.attn_factor={factor} is not known here, only 1")
    if architecture.family in LARGE:
        large = facts["block_count"] == LARGE[architecture.family]
        json["query_pre_attn_scalar"] = even if large else json["head_dim"]
    return families.FAMILIES[architecture.family].read(json)


def _facts_of(config: Transformer, context: int) -> tuple[Architecture, Json]:
    """The first architecture that can be the model, and its metadata."""
    same = dataclasses.replace(families.canonical(config), dtype="float32", dropout=0.0)
    unstretched = same
    if _is_llama3(same):
        unstretched = dataclasses.replace(same, positions=Rotary(same.positions.theta))
    reasons = {}
    for architecture in ARCHITECTURES:
        plain = unstretched if architecture.name == "llama" else same
        json = families.FAMILIES[architecture.family].write(plain)
        json |= {"max_position_embeddings": context, "n_positions": json.get("n_positions", context)}
        facts = {
            key: json[theirs] for key, theirs in architecture.keys.items() if json.get(theirs) is not None
        }
        scaling = json.get("rope_scaling") or {}
        if scaling.get("rope_type") in ("linear", "yarn"):
            facts |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
            if original := scaling.get("original_max_position_embeddings"):
                facts[ORIGINAL] = original
        try:
            read = _read(architecture, facts | {"tied": config.tied})
        except UserError as error:
            reasons[architecture.name] = [str(error)]
            continue
        different = [
            f.name for f in dataclasses.fields(same) if getattr(read, f.name) != getattr(plain, f.name)
        ]
        if not different:
            length = same.size_of_head
            facts |= {"attention.value_length": length, "rope.dimension_count": length}
            if _is_llama3(same):
                facts[ORIGINAL] = same.positions.stretch.original
                _stretched(plain, _divisors(same), facts[ORIGINAL], "the model")
            facts = {f"{architecture.name}.{key}": value for key, value in facts.items()}
            return architecture, facts
        reasons[architecture.name] = [f"model.{name}={getattr(config, name)}" for name in different]
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise UserError(
        f"no architecture of GGUF is this model; {nearest} differs in {', '.join(reasons[nearest])}"
    )


def _is_llama3(config: Transformer) -> bool:
    return isinstance(config.positions, Rotary) and isinstance(config.positions.stretch, Llama3)


def _divisors(config: Transformer) -> np.ndarray:
    """What each rotary frequency is divided by."""
    plain = frequencies(config.size_of_head, config.positions.theta)
    return np.asarray(plain / config.positions.stretch.stretch(plain, config.positions.theta), np.float32)


def _stretched(config: Transformer, divisors: np.ndarray, original: int, source: str) -> Transformer:
    """The model with the stretch that these divisors come from: Llama 3's, with bands as it was released."""
    stretch = Llama3(factor=float(divisors.max()), original=original)
    found = dataclasses.replace(config, positions=Rotary(config.positions.theta, stretch))
    if not np.allclose(_divisors(found), divisors, rtol=1e-4):
        raise UserError(f"{source}: {STRETCHED} is not Llama 3's stretch of rotary positions")
    return found


# ---- tensors ----


def _plain(value: Any) -> Any:
    """The shortest number that is this one in float32: 1e-5 is written as 9.99999975e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    if len(shape) < 2 or kind == "F32" or name in WIDE or ".ffn_gate_inp." in name:
        return GGMLQuantizationType.F32
    if kind == "Q8_0" and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind]


def _encode(array: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    return np.ascontiguousarray(quants.quantize(array, type_))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One fact under the type that llama.cpp expects of it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
