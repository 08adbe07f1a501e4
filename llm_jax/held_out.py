"""Scoring the held-out documents: nats per token and bits per byte, with a standard error over documents."""

import math
from collections.abc import Callable

import jax
import numpy as np

from llm_jax import sharding
from llm_jax.data import HeldOut
from llm_jax.losses import token_losses
from llm_jax.models import Batch, Model, Params


def make_scorer(model: Model) -> Callable[[Params, Batch], jax.Array]:
    """The compiled function from parameters and a batch to each target's nats [B, T]."""
    return jax.jit(lambda params, batch: token_losses(model, params, batch))


def score(
    scorer: Callable[[Params, Batch], jax.Array],
    params: Params,
    held_out: HeldOut,
    rows: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Scores every held-out document in full, `rows` windows at a time.

    The standard error is that of the ratio (sum of nats) / (sum of tokens), documents being independent
    (linearisation; Cochran, Sampling Techniques, 3rd edition, equation 2.45); one document alone has none. Of
    a mixture every source has a loss/NAME and held_out_tokens/NAME too.
    """
    nats = np.zeros(held_out.documents)
    tokens = np.zeros(held_out.documents)
    for batch in held_out.batches(rows):
        document, mask = batch.pop("document"), batch["mask"]
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        on_mesh = sharding.load_rows(lambda chosen, b=batch: {k: v[chosen] for k, v in b.items()}, spec, mesh)
        losses = np.asarray(scorer(params, on_mesh), np.float64) * mask
        nats += np.bincount(document.ravel(), losses.ravel(), minlength=len(nats))
        tokens += np.bincount(document.ravel(), mask.ravel(), minlength=len(tokens))
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
