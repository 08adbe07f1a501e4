"""A sweep whose law is known: the run table that records.load_sweep would give, without training anything."""

import json
import pathlib

import numpy as np
import pandas as pd

from llm_jax.scaling import grids
from llm_jax.scaling.laws import Chinchilla, Parameter

TRUTH = {"E": 1.2, "A": 25.0, "alpha": 0.30, "B": 400.0, "beta": 0.40}
BUDGETS = (1e13, 3e13, 9e13)


class FewStarts(Chinchilla):
    """The same law from 32 starts near the answer, not 4,500, so that many sweeps are quick to fit."""

    name = ""
    parameters = tuple(
        Parameter(p.name, grid, p.log, p.lower, p.upper)
        for p, grid in zip(
            Chinchilla.parameters, ((-0.5, 0.5), (2.0, 6.0), (0.2, 0.5), (4.0, 8.0), (0.2, 0.5)), strict=True
        )
    )


def loss(N, D):
    """The law itself, noiseless [nats/token]."""
    return TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"]


def true_optimum(budget):
    """N of lowest loss at budget = 6 N D."""
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    scale = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta))
    return scale * (budget / 6) ** (beta / (alpha + beta))


def candidates():
    """A ladder of models, N from 5 thousand to 20 million, for which 6 N D is exact."""
    sizes = np.unique(np.rint(5e3 * 1.35 ** np.arange(28)).astype(int))
    width = 8 * np.maximum(1, np.rint((sizes / 24) ** 0.5 / 8).astype(int))
    return pd.DataFrame(
        dict(width=width, layers=2, N=sizes, flops_per_token=6.0 * sizes, tokens_per_step=2048)
    )


def runs(seed=0, noise=0.003, budgets=BUDGETS, sizes=6, holdout_factor=4.0):
    """One row a run, in result.json's fields: a grid around the optimum, and a hold-out beyond it."""
    ladder = candidates()
    grid = grids.isoflop(ladder, budgets, true_optimum, sizes=sizes)
    cells = (grid + grids.holdout(ladder, holdout_factor * max(budgets), true_optimum)).cells
    rng = np.random.default_rng(seed)
    measured = loss(cells["N"], cells["D"]) * np.exp(noise * rng.standard_normal(len(cells)))
    seconds = cells["flops"] / 5e10
    return cells.drop(columns=["flops", "deviation", "flops_per_token", "tokens_per_step"]).assign(
        identity=[f"{index:012x}" for index in range(len(cells))],
        status="done",
        loss=measured,
        loss_standard_error=0.002,
        bits_per_byte=measured / np.log(2) / 3.1,
        train_loss=measured * 0.99,
        N_total=cells["N"] + 1024 * cells["width"],
        N_matmul=cells["N"],
        C=cells["flops"],
        flops_6nd=cells["flops"],
        flops_exact=cells["flops"] * 1.1,
        wall_seconds=seconds,
        compile_seconds=2.0,
        tokens_per_second=cells["D"] / seconds,
        flops_per_second=5e10,
        mfu=np.nan,
        device="cpu",
        seed=0,
        **{"optimizer.learning_rate": 0.1 / cells["width"] ** 0.5},
    )


def trunk_runs(noise=0.003, steps=(400, 800, 1600), sizes=(10_000, 30_000, 90_000)):
    """Runs of role wsd, the longest of each size a trunk of the others, and cosine runs of the same cells."""
    rng, rows = np.random.default_rng(1), []
    for role in ("wsd", "cosine"):
        for N in sizes:
            for count in steps:
                D, branch = count * 512, role == "wsd" and count < max(steps)
                shared = round(0.8 * count) if branch else 0
                rows.append(
                    {
                        "name": f"{role}-{N}-{count}",
                        "identity": f"{len(rows):012x}",
                        "trunk": f"{role}-{N}-{max(steps)}" if branch else None,
                        "role": role,
                        "N": N,
                        "N_matmul": N,
                        "D": D,
                        "steps": count,
                        "steps_shared": shared,
                        "steps_trained": count - shared,
                        "flops_exact": 6.0 * N * D,
                        "flops_6nd": 6.0 * N * D,
                        "flops_spent": 6.0 * N * D * (count - shared) / count,
                        "loss": loss(N, D) * np.exp(noise * rng.standard_normal()),
                        "status": "done",
                        "seed": 0,
                    }
                )
    return pd.DataFrame(rows)


def write_records(folder, table):
    """The same table as run folders: config.json, metrics/00000.jsonl and result.json in folder/<name>.

    trunk, if there is such a column, names the run that the first `steps_shared` steps are from.
    """
    identities = dict(zip(table["name"], table["identity"], strict=True))
    for row in table.to_dict("records"):
        row = {key: None if value != value else value for key, value in row.items()}
        run = pathlib.Path(folder) / row["name"]
        (run / "metrics").mkdir(parents=True)
        config = {"identity": row["identity"], "schema": 1, "config": {"seed": row["seed"]}, "cell": {}}
        (run / "config.json").write_text(json.dumps(config))
        recorded = {key: value for key, value in row.items() if key not in ("N", "C")}
        (run / "result.json").write_text(json.dumps(recorded))
        head, begin = {"part": 0, "resume_at": 0}, 0
        if trunk := row.get("trunk"):
            begin = row["steps_shared"]
            head |= {"resume_at": begin, "trunk": {"folder": f"../{trunk}", "identity": identities[trunk]}}
        marks = np.unique(np.linspace(1, row["steps"], 20).astype(int))
        lines = [head] + [
            {
                "step": int(s),
                "loss": float(loss(row["N"], row["D"] * s / row["steps"])),
                "learning_rate": 0.01,
            }
            for s in marks
            if s > begin
        ]
        (run / "metrics" / "00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
