"""Scoring a text: the log-probability of each token given those before it.

python -m llm_jax.score --model=DIR|FILE.gguf|RUN --text='Once upon a time' --out=scores.npz
python -m llm_jax.score --model=… --ids=tokens.npy
"""

import functools
import math
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llm_jax import command_line, files
from llm_jax.config import UserError
from llm_jax.inference import options
from llm_jax.inference.generation import computing
from llm_jax.inference.opening import Opened
from llm_jax.models import ModelConfig, Params
from llm_jax.process import prepare_xla


class Scores(NamedTuple):
    """ids [B, T]; logprobs [B, T] of each given those before it (nan for the first); logits [B, T, V]."""

    ids: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray


def score(opened: Opened, ids: np.ndarray) -> Scores:
    """Scores rows of ids [B, T] in one pass; raises UserError for ids it can't score, and for too many."""
    opened.check(ids)
    ids = ids.astype(np.int32)
    with computing(opened.config, opened.mesh):
        logits, following = _scorer(opened.config)(opened.params, ids)
    first = np.full((len(ids), 1), math.nan, np.float32)
    return Scores(ids, np.concatenate([first, following], axis=1), np.asarray(logits))


@functools.cache
def _scorer(model_config: ModelConfig):
    model = model_config.build()

    @jax.jit
    def run(params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.unembed(params, model.apply(params, {"tokens": ids}, None).hidden)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        return logits, jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)[..., 0]

    return run


def read_ids(path: str) -> np.ndarray:
    """Ids [B, T] from a .npy file of [T] or [B, T]."""
    try:
        with open(path, "rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--ids={path}: no array of ids: {error}") from None
    if ids.ndim not in (1, 2):
        raise UserError(f"--ids={path}: an array {list(ids.shape)}; ids are [T] or [B, T]")
    return np.atleast_2d(ids)


def write(scores: Scores, place: pathlib.Path) -> None:
    """The arrays of `scores` by name, whole or not at all."""
    with files.filled(place.parent) as folder:
        partial = folder / f"{place.name}.partial"
        with partial.open("wb") as file:
            np.savez(file, **scores._asdict())
        partial.rename(folder / place.name)


def table(opened: Opened, scores: Scores, row: int, candidates: int) -> list[str]:
    """A line for each token: its log-probability, and what was most probable at its place."""

    def name(token: int) -> str:
        text = opened.tokenizer.decode([token]) if opened.tokenizer else ""
        return repr(text) if text else f"#{token}"

    lines = []
    for place, token in enumerate(scores.ids[row]):
        line = f"{place:>5}  {name(token):<20} "  # nothing stands before the first
        if place:
            line += f"{scores.logprobs[row, place]:>9.4f}"
            logits = scores.logits[row, place - 1].astype(np.float64)
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            best = np.argsort(-chances)[:candidates]
            line += "  " + "  ".join(f"{name(token)} {chances[token]:.1%}" for token in best)
        lines.append(line.rstrip())
    return lines


def main() -> None:
    f = flags.FLAGS
    prepare_xla(deterministic=False)
    if not f.model or (f.text is None) == (f.ids is None):
        raise UserError(
            "--model and one of --text and --ids are needed, for example --text='Once upon a time'"
        )
    if f.text == "":
        raise UserError("--text is empty: there is nothing to score")
    if f.candidates < 0:
        raise UserError(f"candidates is {f.candidates}; it is at least 0")
    place = files.path(os.path.expanduser(f.out)) if f.out else None
    if place and not files.in_bucket(place) and not place.parent.is_dir():
        raise UserError(f"--out={f.out}: there is no folder {place.parent}")
    if place and place.is_dir():
        raise UserError(f"--out={f.out} is a folder: name a .npz file in it")
    ids = read_ids(f.ids) if f.ids else None
    opened = options.opened(f.model)
    scores = score(opened, opened.encode(f.text)[None] if ids is None else ids)
    for row in range(len(scores.ids)):
        print("\n".join(table(opened, scores, row, f.candidates)))
        count = scores.ids.shape[1] - 1
        if count:
            print(f"{-np.nansum(scores.logprobs[row]) / count:.4f} nats a token over {count}")
    if place:
        write(scores, place)


if __name__ == "__main__":
    options.define_model()
    flags.DEFINE_string("text", None, "the text to score")
    flags.DEFINE_string("ids", None, "a .npy file of token ids, [T] or [B, T]")
    flags.DEFINE_string("out", None, "a .npz file for ids, logprobs and float32 logits")
    flags.DEFINE_integer("candidates", 3, "how many of the most probable tokens are shown at each place")
    command_line.run_main(main)
