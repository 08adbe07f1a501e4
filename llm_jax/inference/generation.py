"""The compiled part of generation: prefill and one decoding step, for as many rows as there are slots.

Both are compiled once for each bucket of lengths (powers of two), whatever the prompts are. A row's tokens
follow from its own prompt, settings and seed, not from who decodes beside it: in float32 token for token. In
bfloat16, and with weights of eight bits on a CPU, products of one row round otherwise than those of several,
so company can decide there between two tokens about as probable.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import UserError
from llm_jax.inference.sampling import Sampling, Settings, sample
from llm_jax.models import Layout, Model, ModelConfig, Params
from llm_jax.sharding import constrain

PIECE = 512  # tokens of a prompt that are read at once
SHORTEST = 64  # the smallest bucket of a state


class Rows(NamedTuple):
    """What B rows are at, beside the model's state.

    token: the last one, which the state hasn't seen. start: how many it has. drawn: how many were sampled.
    keys: raw [B, 2]. seen: [B, V], which tokens the text has.
    """

    token: jax.Array
    start: jax.Array
    drawn: jax.Array
    keys: jax.Array
    seen: jax.Array
    settings: Settings


class Prompt(NamedTuple):
    """A prompt that `Engine.ready` has checked: ids [T], the settings of one row, and whose sample it is."""

    ids: np.ndarray
    settings: Settings
    seed: int
    number: int


class Drawn(NamedTuple):
    """A token [B] of each row with its log-probability by the model itself (before any setting), and

    the most probable ones [B, N] with theirs.
    """

    token: jax.Array
    logprob: jax.Array
    top: jax.Array
    top_logprobs: jax.Array


def bucket(size: int, smallest: int = 1) -> int:
    """The power of two from `smallest` on that holds `size`."""
    return max(smallest, 1 << max(0, size - 1).bit_length())


class Engine:
    """The compiled functions of a model; `candidates`: how many of the most probable tokens each step tells.

    mesh: where the parameters lie, if not on one device; the state is spread as they are. keep: `params` can
    be used elsewhere too; else they are used up, where layers apart would be a second copy. Parameters are an
    argument of every function, so weights can be exchanged without compiling.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        candidates: int = 0,
        mesh: Mesh | None = None,
        layout: Layout | None = None,
        keep: bool = True,
    ) -> None:
        self.model: Model = config.build(layout or Layout())
        self.params, self._place = self.model.apart(params, keep), (config, mesh)
        self.vocabulary, self.candidates = config.vocabulary, min(candidates, config.vocabulary)
        self._width = jax.eval_shape(
            lambda p: self.model.apply(p, {"tokens": jnp.zeros((1, 1), jnp.int32)}, None).hidden, self.params
        )
        self._read = jax.jit(self._read, donate_argnums=(1, 2))
        self._join = jax.jit(self._join, donate_argnums=(1, 2))
        self._step = jax.jit(self._step, donate_argnums=(1, 2))
        self._grow = jax.jit(self._grow, static_argnums=(2, 3))
        self._empty = jax.jit(self._empty, static_argnums=(0, 1))

    def empty(self, slots: int, length: int) -> tuple[Any, Rows]:
        """State and rows of `slots` rows of up to `length` tokens, none of which is at anything."""
        with self.computing():
            return self._empty(slots, length)

    def grow(self, state: Any, rows: Rows, slots: int, length: int) -> tuple[Any, Rows]:
        """The same state and rows among `slots` rows, with room for `length` tokens each."""
        with self.computing():
            return self._grow(state, rows, slots, length)

    def ready(self, ids: np.ndarray, sampling: Sampling = Sampling(), number: int = 0) -> Prompt:
        """A prompt as `join` takes it; number: which of several samples of one seed.

        Raises UserError for what can't be sampled, so that no request breaks those that it joins.
        """
        sampling.check(self.vocabulary)
        if len(ids) == 0:
            raise UserError("the prompt is empty: give at least one token to continue")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise UserError(f"the prompt has ids outside 0 .. {self.vocabulary - 1}")
        return Prompt(ids.astype(np.int32), Settings.of([sampling], self.vocabulary), sampling.seed, number)

    def join(
        self, state: Any, rows: Rows, prompts: Sequence[Prompt], slots: Sequence[int]
    ) -> tuple[Any, Rows, Drawn]:
        """Reads prompts into free slots and draws the first token of each.

        A prompt of several samples is read once. The state must have room for the longest prompt. What is
        drawn has a row for each prompt (and more, to be ignored).
        """
        count, longest = bucket(len(prompts)), max(len(prompt.ids) for prompt in prompts)
        fill = count - len(prompts)
        texts = [tuple(prompt.ids.tolist()) for prompt in prompts]
        read = list(dict.fromkeys(texts))
        sources = np.array([*map(read.index, texts), *[0] * fill], np.int32)
        lengths = np.array([*map(len, read), *[0] * (bucket(len(read)) - len(read))], np.int32)
        tokens = np.zeros((len(lengths), bucket(longest, 16)), np.int32)
        for row, text in enumerate(read):
            tokens[row, : len(text)] = text
        seen = np.zeros((count, self.vocabulary), bool)
        for row, prompt in enumerate(prompts):
            seen[row, prompt.ids] = True
        settings = [prompt.settings for prompt in prompts] + [
            Settings.of([Sampling()], self.vocabulary)
        ] * fill
        with self.computing():
            fresh = self._empty(len(lengths), bucket(longest, SHORTEST))[0]
            last = jnp.zeros((len(lengths), self._width.shape[-1]), self._width.dtype)
            for start in range(0, longest, PIECE):
                piece = tokens[:, start : start + PIECE]
                last, fresh = self._read(self.params, fresh, last, piece, np.int32(start), lengths)
            new = Rows(
                token=np.zeros(count, np.int32),
                start=lengths[sources],
                drawn=np.zeros(count, np.int32),
                keys=_keys([(prompt.seed, prompt.number) for prompt in prompts] + [(0, 0)] * fill),
                seen=seen,
                settings=Settings(*map(np.concatenate, zip(*settings, strict=True))),
            )
            places = np.array([*slots, *[len(rows.start)] * fill], np.int32)  # outside: dropped
            return self._join(self.params, state, rows, fresh, new, last, sources, places)

    def step(self, state: Any, rows: Rows, active: np.ndarray) -> tuple[Any, Rows, Drawn]:
        """One more token of each active row [B]; the state must have room for it."""
        with self.computing():
            return self._step(self.params, state, rows, active)

    # ---- what is compiled ----

    def _empty(self, slots: int, length: int) -> tuple[Any, Rows]:
        zeros = functools.partial(jnp.zeros, slots)
        settings = jax.tree.map(jnp.asarray, Settings.of([Sampling()] * slots, self.vocabulary))
        seen = jnp.zeros((slots, self.vocabulary), bool)
        rows = Rows(*(zeros(jnp.int32),) * 3, jnp.zeros((slots, 2), jnp.uint32), seen, settings)
        return self._placed(self.model.init_state(slots, length)), rows

    def _grow(self, state: Any, rows: Rows, slots: int, length: int) -> tuple[Any, Rows]:
        def put(room: jax.Array, old: jax.Array) -> jax.Array:
            return room.at[tuple(map(slice, old.shape))].set(old)

        state, rows = jax.tree.map(put, self._empty(slots, length), (state, rows))
        return self._placed(state), rows

    def _read(
        self,
        params: Params,
        state: Any,
        last_BD: jax.Array,
        tokens_BT: jax.Array,
        start: jax.Array,
        lengths_B: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """A piece of prompts from `start` on; last_BD becomes the hidden state at a prompt's last token."""
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        here_B = jnp.clip(lengths_B - start, 0, T)
        hidden_BTD, state = self.model.decode(params, state, tokens_BT, positions_BT, here_B)
        ends_B = lengths_B - 1 - start
        found_BD = hidden_BTD[jnp.arange(B), jnp.clip(ends_B, 0, T - 1)]
        inside_B1 = ((ends_B >= 0) & (ends_B < T))[:, None]
        return jnp.where(inside_B1, found_BD, last_BD), self._placed(state)

    def _join(
        self,
        params: Params,
        state: Any,
        rows: Rows,
        fresh: Any,
        new: Rows,
        last_BD: jax.Array,
        sources_B: jax.Array,
        places_B: jax.Array,
    ) -> tuple[Any, Rows, Drawn]:
        """New rows, each with the state of its source, put into their slots, and their first token."""
        new, drawn = self._draw(params, last_BD[sources_B], new)

        def put(old: jax.Array, arrived: jax.Array, axes: Sequence[str | None]) -> jax.Array:
            """The first slots of a cache are those of a longer one as long as none was used twice."""
            batch = axes.index("batch")
            where = tuple(
                places_B if axis == batch else slice(size) for axis, size in enumerate(arrived.shape)
            )
            return old.at[where].set(jnp.take(arrived, sources_B, axis=batch), mode="drop")

        flat, tree = jax.tree.flatten(state)
        flat = [put(*leaf) for leaf in zip(flat, jax.tree.leaves(fresh), self._axes(state), strict=True)]
        rows = jax.tree.map(lambda old, one: old.at[places_B].set(one, mode="drop"), rows, new)
        return self._placed(jax.tree.unflatten(tree, flat)), rows, drawn

    def _step(self, params: Params, state: Any, rows: Rows, active_B: jax.Array) -> tuple[Any, Rows, Drawn]:
        more_B = active_B.astype(jnp.int32)
        hidden_BTD, state = self.model.decode(params, state, rows.token[:, None], rows.start[:, None], more_B)
        rows, drawn = self._draw(params, hidden_BTD[:, 0], rows._replace(start=rows.start + more_B))
        return self._placed(state), rows, drawn

    def _draw(self, params: Params, hidden_BD: jax.Array, rows: Rows) -> tuple[Rows, Drawn]:
        logits_BV = self.model.unembed(params, hidden_BD)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.keys), rows.drawn)
        token_B = sample(logits_BV, rows.settings, rows.seen, keys)
        every = jnp.arange(len(token_B))
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        top_logprobs, top = jax.lax.top_k(logprobs_BV, self.candidates)
        rows = rows._replace(token=token_B, drawn=rows.drawn + 1, seen=rows.seen.at[every, token_B].set(True))
        return rows, Drawn(token_B, logprobs_BV[every, token_B], top, top_logprobs)

    def _axes(self, state: Any) -> list[tuple[str | None, ...]]:
        """The logical axes of each leaf of a state."""
        return jax.tree.structure(state).flatten_up_to(self.model.state_axes(state))

    def _placed(self, state: Any) -> Any:
        flat, tree = jax.tree.flatten(state)
        placed = [constrain(leaf, *axes) for leaf, axes in zip(flat, self._axes(state), strict=True)]
        return jax.tree.unflatten(tree, placed)

    def computing(self) -> contextlib.AbstractContextManager:
        """Where all of this is computed."""
        return computing(*self._place)


@contextlib.contextmanager
def computing(config: ModelConfig, mesh: Mesh | None) -> Iterator[None]:
    """What is computed inside is on the mesh, if there is one, and, in float32, exact.

    JAX's default for float32 is TF32 on a GPU and bfloat16 on a TPU, which is meant for training.
    """
    exact = "highest" if getattr(config, "dtype", None) == "float32" else None
    place = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with place, jax.default_matmul_precision(exact):
        yield


@functools.partial(jax.jit)
def _fold(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
    return jax.random.key_data(keys)


def _keys(samples: Sequence[tuple[int, int]]) -> jax.Array:
    """Raw keys [B, 2] of samples by seed and number."""
    return _fold(*np.array(samples, np.uint32).T)
