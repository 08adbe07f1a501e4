"""Asking a model many requests at once: batched by length, spread as the model is, each answered only once.

    evaluator = Evaluator(opened, keep=True)
    answers = evaluator.run(requests)

What is answered is on disk at once, by the content of model and request, so a killed evaluation goes on where
it was.
"""

import contextlib
import hashlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from llm_jax import claims, sharding
from llm_jax import config as configs
from llm_jax.data.cache import cache_folder, digest
from llm_jax.evaluation.requests import (
    Answered,
    Generate,
    Generated,
    Part,
    Request,
    Scored,
    answer_of,
    beginning,
    encode,
    key,
    parts,
)
from llm_jax.inference.batching import Batcher
from llm_jax.inference.batching import Request as Prompt
from llm_jax.inference.generation import Engine, bucket
from llm_jax.inference.opening import Opened
from llm_jax.models import Params

MEANING = 2  # of answers on disk: raised when the same request would be answered otherwise
BATCH_TOKENS = 4096  # of one pass
SHORTEST = 32  # the smallest width of a pass
PICKED = 128  # positions whose logits exist at once


class Evaluator:
    """A model that is asked. keep: answers stay on disk, in the cache's folder, by `content`.

    slots: how many answers are generated at once.
    """

    def __init__(self, opened: Opened, keep: bool = False, slots: int = 16) -> None:
        self.opened = opened._replace(params=None)  # the engine has them
        self._mesh, self._slots = opened.mesh, slots
        self._engine = Engine(opened.config, opened.params, mesh=opened.mesh)
        # Rows divide over the mesh.
        self._ways = math.prod(opened.mesh.shape[n] for n in sharding.TABLE["batch"]) if opened.mesh else 1
        self._read, self._pick = jax.jit(self._read), jax.jit(self._pick)
        self._keep = keep
        self._of(opened)

    def _of(self, opened: Opened) -> None:
        self.content = content(opened) if self._keep else ""
        self._kept = _Kept(cache_folder() / "evaluation" / f"{self.content}.jsonl" if self._keep else None)

    def exchange(self, params: Params) -> None:
        """The same model with other parameters, for which nothing is compiled again."""
        self._engine.params = self._engine.model.apart(params, True)
        self._of(self.opened._replace(params=params))

    def run(self, requests: Sequence[Request], what: str = "requests") -> list[Answered]:
        """The answers in order; `what` names the bar that is shown where it takes longer than seconds."""
        names = [key(request) for request in requests]
        asked = dict(zip(names, requests, strict=True))
        missing = {name: request for name, request in asked.items() if name not in self._kept}
        bar = tqdm.tqdm(
            desc=what,
            total=len(asked),
            initial=len(asked) - len(missing),
            delay=2,
            file=sys.stderr,
            leave=False,
        )
        with bar:
            for name, answer in itertools.chain(self._score(missing), self._generate(missing)):
                self._kept[name] = answer
                bar.update()
                claims.stir()
        return [answer_of(asked[name], self._kept[name]) for name in names]

    # ---- probabilities ----

    def _score(self, asked: Mapping[str, Request]) -> Iterator[tuple[str, Scored]]:
        """Passes from the longest down; requests that differ in their last token alone share one."""
        answers, left, rows = {}, {}, {}
        for name, request in asked.items():
            if isinstance(request, Generate):
                continue
            pieces, cut = parts(request, self.opened)
            answers[name], left[name] = Scored(0.0, 0, True, cut), len(pieces)
            if not pieces:
                yield name, answers[name]
            for part in pieces:
                rows.setdefault(part.tokens[:-1].tobytes(), []).append((name, part))
        order = sorted(rows.values(), key=lambda row: -len(row[0][1].tokens))
        while order:
            width = _width(len(order[0][0][1].tokens) - 1)
            most = self._ways << (max(1, BATCH_TOKENS // width // self._ways).bit_length() - 1)
            batch, order = order[:most], order[most:]
            found = self._pass([[part for _, part in row] for row in batch], width)
            for (name, _), (nats, tokens, greedy) in zip(itertools.chain(*batch), found, strict=True):
                before = answers[name]
                answers[name] = before._replace(
                    nats=before.nats + nats, tokens=before.tokens + tokens, greedy=before.greedy and greedy
                )
                left[name] -= 1
                if not left[name]:
                    yield name, answers[name]

    def _pass(self, rows: Sequence[Sequence[Part]], width: int) -> list[tuple[float, int, bool]]:
        """(nats, tokens, greedy) of every part; those of a row have the same tokens before the last."""
        tokens = np.zeros((self._ways * bucket(-(-len(rows) // self._ways)), width), np.int32)
        places, targets, ends = [], [], [0]
        for row, shared in enumerate(rows):
            for part in shared:
                length = len(part.tokens) - 1
                tokens[row, :length] = part.tokens[:-1]
                places.append(row * width + np.arange(length - part.count, length))
                targets.append(part.tokens[-part.count :])
                ends.append(ends[-1] + part.count)
        places, targets = np.concatenate(places), np.concatenate(targets)
        fill = -len(places) % PICKED
        places, targets = np.pad(places, (0, fill)), np.pad(targets, (0, fill))
        with self._engine.computing():
            hidden = self._read(self._engine.params, self._placed(tokens))
            picked = [
                self._pick(self._engine.params, hidden, places[i : i + PICKED], targets[i : i + PICKED])
                for i in range(0, len(places), PICKED)
            ]
        nats, greedy = (
            np.concatenate([np.asarray(x) for x in column]) for column in zip(*picked, strict=True)
        )
        return [
            (float(nats[start:end].sum(dtype=np.float64)), end - start, bool(greedy[start:end].all()))
            for start, end in itertools.pairwise(ends)
        ]

    def _read(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
        return self._engine.model.apply(params, {"tokens": tokens_BT}, None).hidden

    def _pick(
        self, params: Params, hidden_BTD: jax.Array, places_N: jax.Array, targets_N: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Nats of the targets, and whether each is the most probable token at its place."""
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places_N]
        logits_NV = self._engine.model.unembed(params, hidden_ND).astype(jnp.float32)
        chosen_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_NV, axis=-1) - chosen_N, logits_NV.argmax(-1) == targets_N

    def _placed(self, tokens: np.ndarray) -> Any:
        return tokens if self._mesh is None else jax.device_put(tokens, sharding.batch_sharding(self._mesh))

    # ---- texts ----

    def _generate(self, asked: Mapping[str, Request]) -> Iterator[tuple[str, Generated]]:
        """Continuous batching, the longest prompts first."""
        opened, waiting = self.opened, []
        for name, request in asked.items():
            if isinstance(request, Generate):
                prompt = encode(opened, request.prompt, not request.written)
                prompt = prompt if len(prompt) else beginning(opened)[None]
                room = len(prompt)
                if opened.context is not None:
                    room = max(opened.context - request.max_tokens, opened.context // 2)
                waiting.append((name, request, prompt[-room:], max(0, len(prompt) - room)))
        waiting.sort(key=lambda one: -len(one[2]))
        batcher = Batcher(self._engine, self._slots, opened.context, opened.tokenizer)
        names = {}
        for name, request, prompt, cut in waiting:
            asked_for = Prompt(prompt, request.sampling, request.max_tokens, opened.stop_ids, request.stops)
            names[batcher.submit(asked_for)] = name, cut
        while batcher.busy:
            for answer, _ in batcher.step():
                if answer.finish:
                    name, cut = names[answer]
                    tokens, stop = len(answer.tokens), answer.stopped_at
                    yield name, Generated(answer.text, answer.finish, tokens, cut, stop)


class _Kept(dict):
    """Answers by their request's key, as JSON lists; each is on disk as soon as it is set."""

    def __init__(self, place: pathlib.Path | None) -> None:
        super().__init__()
        self._place = place
        if place is not None and place.is_file():
            text = place.read_text()
            for line in text.splitlines():
                with contextlib.suppress(ValueError):  # a kill leaves half a line
                    name, answer = json.loads(line)
                    super().__setitem__(name, answer)
            if text and not text.endswith("\n"):
                self._write("\n")

    def __setitem__(self, name: str, answer: Answered) -> None:
        super().__setitem__(name, list(answer))
        self._write(json.dumps([name, list(answer)]) + "\n")

    def _write(self, text: str) -> None:
        if self._place is not None:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with self._place.open("a") as file:
                file.write(text)


def content(opened: Opened) -> str:
    """A hash of all that decides a model's answers: parameters, config, tokenizer, context, first token."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(opened.params):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8))
    tokenizer = opened.tokenizer
    told = tokenizer and [tokenizer.data, dict(tokenizer.special), list(tokenizer.stops)]
    facts = [MEANING, configs.to_json(opened.config), told, opened.context, sha.hexdigest()]
    facts += [opened.first] if opened.first is not None else []
    return digest(facts)


def _width(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, ... that holds `length`."""
    whole = bucket(length, SHORTEST)
    return whole * 3 // 4 if whole > SHORTEST and length <= whole * 3 // 4 else whole
