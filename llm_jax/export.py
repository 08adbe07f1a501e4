"""Writing a model down for other tools: a directory in Hugging Face's format, or a GGUF file for llama.cpp.

python -m llm_jax.export --model=RUN|DIR|FILE.gguf --to=DIR|FILE.gguf --dtype=bfloat16
"""

import os
import pathlib

from absl import flags

from llm_jax import command_line, files
from llm_jax.config import UserError
from llm_jax.inference import options
from llm_jax.inference.opening import Opened, open_model
from llm_jax.interop import gguf, huggingface, tensors
from llm_jax.models.transformer import Transformer
from llm_jax.process import prepare_xla

KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}


def export(opened: Opened, place: pathlib.Path, dtype: str | None = None) -> None:
    """Writes a model to `place`, a GGUF file if it ends in .gguf, else a directory; whole or not at all.

    dtype: of weights, by default as they are. Raises UserError for a model that other tools don't know.
    """
    if not isinstance(opened.config, Transformer):
        raise UserError(f"{opened.name} is a {opened.config.kind}, which other tools don't know")
    if place.suffix == ".gguf":
        kind = KINDS[dtype or tensors.stored(opened.params)]
        gguf.save(place, opened.config, opened.params, opened.tokenizer, kind)
    else:
        model = opened.config, opened.params, opened.tokenizer
        huggingface.save(place, *model, dtype=dtype, context=opened.context)


def main() -> None:
    f = flags.FLAGS
    prepare_xla(deterministic=False)
    if not f.model or not f.to:
        raise UserError("--model and --to are needed, for example --model=runs/mine --to=mine.gguf")
    place = files.path(os.path.expanduser(f.to))
    if files.in_bucket(place):
        raise UserError(f"--to={f.to}: a model is written to a disk; copy it from there")
    if place.exists():
        raise UserError(f"--to={f.to} exists; give another name")
    if f.dtype == "q8_0" and place.suffix != ".gguf":
        raise UserError(f"--dtype=q8_0 is for .gguf files; {f.to} is written in float32, bfloat16 or float16")
    export(open_model(f.model, mesh=options.mesh()), place, f.dtype)
    size = sum(file.stat().st_size for file in [place, *place.glob("*")] if file.is_file())
    print(f"{place}: {size:,} bytes")


if __name__ == "__main__":
    options.define_model(tuple(KINDS))
    flags.DEFINE_string("to", None, "a directory or a .gguf file, which must not exist")
    command_line.run_main(main)
