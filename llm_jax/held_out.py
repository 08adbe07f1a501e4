"""Scoring the held-out documents: nats per token and bits per byte, with a standard error over documents."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from llm_jax import claims, sharding
from llm_jax.data import HeldOut
from llm_jax.losses import token_losses
from llm_jax.models import Batch, Model, Params


def make_scorer(
    model: Model, packed: bool = False, place: jax.sharding.Sharding | None = None
) -> Callable[[Params, Batch], jax.Array]:
    """The compiled function from parameters and a batch to each target's nats [B, T].

    packed: the parameters have a leading member axis, and the result is [M, B, T]. place: where the result
    lies; a host reads what is whole on its own devices.
    """
    scorer = functools.partial(token_losses, model)
    scorer = jax.vmap(scorer, (0, None), spmd_axis_name="member") if packed else scorer
    return jax.jit(scorer, out_shardings=place)


def score(
    scorer: Callable[[Params, Batch], jax.Array],
    params: Params,
    held_out: HeldOut,
    rows: int,
    mesh: jax.sharding.Mesh,
) -> list[dict[str, float]]:
    """Scores every held-out document in full, `rows` windows at a time; one row for each member, or the run.

    The standard error is that of the ratio (sum of nats) / (sum of tokens), documents being independent
    (linearisation; Cochran, Sampling Techniques, 3rd edition, equation 2.45); one document alone has none. Of
    a mixture every source has a loss/NAME and held_out_tokens/NAME too.
    """
    nats, tokens = by_document(scorer, params, held_out, rows, mesh)
    return [_statistics(of_member, tokens, held_out) for of_member in nats]


def by_document(
    scorer: Callable[[Params, Batch], jax.Array],
    params: Params,
    held_out: HeldOut,
    rows: int,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats [members, documents] and tokens [documents] of every held-out document.

    Each process loads the rows that its devices hold.
    """
    nats, tokens = 0.0, np.zeros(held_out.documents)
    place = sharding.batch_sharding(mesh)
    spec = {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place)
        for name, x in held_out.rows(np.arange(1)).items()
    }
    for start in range(0, held_out.count, rows):
        batch = sharding.load_rows(lambda chosen, first=start: held_out.rows(first + chosen), spec)
        told = sharding.everywhere((batch.pop("document"), batch["mask"]), mesh)
        document, mask = map(np.ravel, jax.device_get(told))
        losses = np.asarray(scorer(params, batch), np.float64).reshape(-1, mask.size) * mask
        nats = nats + np.stack([np.bincount(document, row, minlength=len(tokens)) for row in losses])
        tokens += np.bincount(document, mask, minlength=len(tokens))
        claims.stir()
    return nats, tokens


def _statistics(nats: np.ndarray, tokens: np.ndarray, held_out: HeldOut) -> dict[str, float]:
    """What is said of the nats and the tokens of each document."""
    loss = nats.sum() / tokens.sum()
    count = int((tokens > 0).sum())
    spread, by_source, first = {}, {}, 0
    if count > 1:
        variance = np.square(nats - loss * tokens).sum() / (count - 1) * count / tokens.sum() ** 2
        spread["loss_standard_error"] = float(math.sqrt(variance))
    for name, documents in held_out.sources:
        part = slice(first, first := first + documents)
        by_source[f"loss/{name}"] = float(nats[part].sum() / tokens[part].sum())
        by_source[f"held_out_tokens/{name}"] = int(tokens[part].sum())
    return by_source | {
        "loss": float(loss),
        **spread,
        "bits_per_byte": float(nats.sum() / math.log(2) / held_out.bytes),
        "held_out_tokens": int(tokens.sum()),
        "held_out_bytes": int(held_out.bytes),
        "held_out_documents": int(held_out.documents),
    }
