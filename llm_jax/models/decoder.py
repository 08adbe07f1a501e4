"""A decoder: embed, a pattern of blocks, its repeats, a tail, a head.

The blocks of one place in the pattern are stored stacked, with a leading "layers" axis. Whether they run as
one scan or as straight code is an execution setting (`Layout.unroll`), and so is rematerialisation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.kernels import devices, ring_attention
from llm_jax.models import Batch, Layout, Model, Output, Params, cache
from llm_jax.models.blocks import Block, Context, Norm, dropout
from llm_jax.models.int8 import Int8
from llm_jax.models.parametrization import Scaling
from llm_jax.models.positions import Learned, Positions, Sinusoidal, rotation, sinusoids
from llm_jax.models.roles import draw, parameter, roles
from llm_jax.sharding import constrain


class Embed(nn.Module):
    """Token embeddings and learned positions, times `multiplier`."""

    vocabulary: int
    width: int
    positions: Positions
    dtype: jnp.dtype
    multiplier: float = 1.0

    def setup(self) -> None:
        self.embedding = parameter(self, "embedding", (self.vocabulary, self.width))
        if isinstance(self.positions, Learned):
            self.position = parameter(self, "position", (self.positions.length, self.width))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        # A gather from a table whose width is spread over devices would first be replicated.
        if isinstance(self.embedding, Int8):
            x_BTD = self.embedding.rows(tokens_BT)
        else:
            x_BTD = constrain(self.embedding, "vocabulary", None)[tokens_BT]
        if isinstance(self.positions, Learned):
            x_BTD += constrain(self.position, None, None)[positions_BT]
        elif isinstance(self.positions, Sinusoidal):
            x_BTD = x_BTD * self.width**0.5 + sinusoids(positions_BT, self.width, self.positions.theta)
        x_BTD = x_BTD.astype(self.dtype)
        if self.multiplier != 1.0:
            x_BTD *= jnp.asarray(self.multiplier, self.dtype)
        return constrain(x_BTD, "batch", "time", "embed")


class Head(nn.Module):
    """The untied projection from hidden to logits."""

    vocabulary: int
    width: int

    def setup(self) -> None:
        self.head = parameter(self, "head", (self.width, self.vocabulary))

    def __call__(self) -> jax.Array:
        return self.head


@jax.custom_vjp
def unstack(stacked: Params) -> list[Params]:
    """The layers of a stacked tree; its gradient is one stack, not a sum of padded slices."""
    length = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(length)]


unstack.defvjp(
    lambda stacked: (unstack(stacked), None),
    lambda _, layers: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),),
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The functions of a `Model` over a pattern of blocks.

    The pattern runs `repeats` times, then its first `tail` blocks once more. A norm of None leaves the last
    block's output as it is; a head of None is the transposed embedding.
    """

    embed: Embed
    pattern: tuple[Block, ...]
    repeats: int
    tail: int
    norm: Norm | None
    head: Head | None
    softcap: float | None
    dropout: float
    scaling: Scaling
    layout: Layout

    def model(self) -> Model:
        """The decoder as the trainer sees it."""
        return Model(
            init=self.init,
            apply=self.apply,
            unembed=self.unembed,
            roles=functools.partial(roles, scaling=self.scaling),
            unembed_params=self.unembed_params,
            init_state=self.init_state,
            decode=self.decode,
            state_axes=self.state_axes,
            activations=self.activations,
            finish=self.finish,
            apart=self.apart,
        )

    def groups(self) -> list[tuple[str, tuple[Block, ...], int]]:
        """(name, blocks, repeats) of the body and the tail, where there are any."""
        groups = [("body", self.pattern, self.repeats), ("tail", self.pattern[: self.tail], 1)]
        return [group for group in groups if group[1] and group[2]]

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: {"embed", "body": {"0": stacked block, …}, "tail", "norm", "head"}."""
        one = jnp.zeros((1, 1), jnp.int32)
        x_BTD = jnp.zeros((1, 1, self.embed.width), self.embed.dtype)
        context = self.context(one, attention="reference")
        keys, factors = iter(jax.random.split(key, 3 + len(self.pattern) + self.tail)), self.scaling.init

        def single(module: nn.Module, *inputs: Any) -> Params:
            return draw(next(keys), jax.eval_shape(module.init, key, *inputs)["params"], factors)

        def stack(block: Block, repeats: int) -> Params:
            shapes = jax.eval_shape(lambda: block.init(key, x_BTD, context))["params"]
            return jax.lax.map(lambda k: draw(k, shapes, factors), jax.random.split(next(keys), repeats))

        params = {"embed": single(self.embed, one, one)}
        for name, blocks, repeats in self.groups():
            params[name] = {str(i): stack(block, repeats) for i, block in enumerate(blocks)}
        if self.norm is not None:
            params["norm"] = single(self.norm, x_BTD)
        if self.head is not None:
            params["head"] = single(self.head)
        return params

    def context(self, positions_BT: jax.Array, **kwargs: Any) -> Context:
        """What the blocks need to know of the positions, computed once."""
        kinds = {block.mixer.rotary: block.mixer.head_width for block in self.pattern if block.mixer.rotary}
        turns = {rotary: rotation(positions_BT, width, rotary) for rotary, width in kinds.items()}
        return Context(turns, **kwargs)

    def apply(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Output:
        """Hidden states [B, T, D] of `batch["tokens"]` [B, T]; "segments" and "positions" are optional.

        Where the mesh spreads sequences, tokens are in the order of ring attention in between.
        """
        tokens_BT, attention = batch["tokens"], self.layout.attention
        positions_BT = batch.get("positions", jnp.arange(tokens_BT.shape[1])[None])
        rows = tokens_BT, positions_BT, batch.get("segments")
        ring = attention == "ring" or (attention == "auto" and ring_attention.ways() > 1)
        if ring:
            order = ring_attention.zigzag(tokens_BT.shape[1], ring_attention.ways())
            attention, rows = "ring", jax.tree.map(lambda x: x[:, order], rows)
        tokens_BT, positions_BT, segments_BT = rows
        context = self.context(positions_BT, segments=segments_BT, attention=attention)
        hidden_BTD, _ = self.run(params, tokens_BT, positions_BT, context, None, key)
        return Output(ring_attention.in_order(hidden_BTD) if ring else hidden_BTD, {})

    def run(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        context: Context,
        state: Any,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Embed, all blocks and the last norm; with a state, what `step` tells of it."""
        keys = [None] * 3 if key is None or self.dropout == 0 else list(jax.random.split(key, 3))
        x_BTD = self.embed.apply({"params": params["embed"]}, tokens_BT, positions_BT)
        x_BTD = dropout(x_BTD, self.dropout, keys.pop())
        new = {}
        for name, blocks, repeats in self.groups():
            group_key = keys.pop()
            layer_keys = None if group_key is None else jax.random.split(group_key, (repeats, len(blocks)))
            layers = (params[name], None if state is None else state[name], layer_keys)
            x_BTD, new[name] = self.repeat(self.step(blocks, context), x_BTD, layers, repeats)
        return self.finish(params, x_BTD), new

    def finish(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """The last norm, if there is one: hidden states of what the last block gives."""
        return x_BTD if self.norm is None else self.norm.apply({"params": params["norm"]}, x_BTD)

    def activations(self, params: Params, batch: Batch, attention: bool = False) -> dict[str, jax.Array]:
        """What stands in every layer [L, B, T, ...]: what mixer and MLP give, and the stream after the block.

        Also, with L = 1: the embedding, the hidden states and the logits. attention: also what each head
        attends to, [L, B, H, T, T].
        """
        tokens_BT = batch["tokens"]
        positions_BT = batch.get("positions", jnp.arange(tokens_BT.shape[1])[None])
        context = self.context(positions_BT, segments=batch.get("segments"), attention="reference")
        x_BTD = self.embed.apply({"params": params["embed"]}, tokens_BT, positions_BT)
        found = {"embedding": [x_BTD], "mixer": [], "mlp": [], "stream": []}
        found |= {"attention": []} if attention else {}
        for name, blocks, repeats in self.groups():
            for layer in range(repeats):
                for i, block in enumerate(blocks):
                    here = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params[name][str(i)])
                    (x_BTD, _), inside = block.apply(
                        {"params": here},
                        x_BTD,
                        context,
                        mutable=["intermediates"],
                        capture_intermediates=lambda module, _: module.name in ("mixer", "mlp"),
                    )
                    inside = inside["intermediates"]
                    found["mixer"].append(inside["mixer"]["__call__"][0][0])
                    found["mlp"].append(inside["mlp"]["__call__"][0])
                    found["stream"].append(x_BTD)
                    if attention:
                        q_BTHK, k_BTGK, _ = inside["mixer"]["project"][0]
                        found["attention"].append(block.mixer.weights(q_BTHK, k_BTGK, context))
        x_BTD = self.finish(params, x_BTD)
        found |= {"hidden": [x_BTD], "logits": [self.unembed(params, x_BTD)]}
        return {name: jnp.stack(layers) for name, layers in found.items()}

    def step(self, blocks: tuple[Block, ...], context: Context) -> Callable:
        """One repeat of the pattern, (x, (params, state, keys)) -> (x, new), rematerialised or not.

        new: the state as it becomes where layers are apart, else what is to be written into their stack.
        """

        def step(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            params, state, keys = layer
            new = {}
            for i, block in enumerate(blocks):
                x_BTD, told = block.apply(
                    {"params": params[str(i)]},
                    x_BTD,
                    context,
                    None if state is None else state[str(i)],
                    None if keys is None else keys[i],
                )
                new[str(i)] = told and told["written" if self.unrolled else "new"]
            return x_BTD, new

        if self.layout.remat == "none":
            return step
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(
            step, prevent_cse=self.unrolled, policy=policy if self.layout.remat == "dots" else None
        )

    @property
    def unrolled(self) -> bool:
        """Whether layers run as straight code."""
        return devices.platform() == "cpu" if self.layout.unroll is None else self.layout.unroll

    def repeat(self, step: Callable, x_BTD: jax.Array, layers: Any, repeats: int) -> tuple[jax.Array, Any]:
        """`step` over the leading axis of `layers`, as one scan or as straight code."""
        if not self.unrolled:
            return jax.lax.scan(step, x_BTD, layers)
        params, state, keys = (part if part is not None else [None] * repeats for part in layers)
        params = params if isinstance(params, list) else unstack(params)
        news = []
        for layer in zip(params, state, keys, strict=True):
            x_BTD, new = step(x_BTD, layer)
            news.append(new)
        return x_BTD, news

    def unembed_params(self, params: Params) -> Params:
        """The subtree that `unembed` reads."""
        if self.head is None:
            return {"embed": {"embedding": params["embed"]["embedding"]}}
        return {"head": params["head"]}

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D], capped as softcap * tanh(logits / softcap)."""
        table = params["embed"]["embedding"] if self.head is None else params["head"]["head"]
        rows = self.scaling.output * hidden.reshape(-1, hidden.shape[-1])
        if isinstance(table, Int8):
            logits = table.product(rows.astype(jnp.float32))
        else:
            table_DV = (table.T if self.head is None else table).astype(hidden.dtype)
            logits = jnp.matmul(rows, table_DV, preferred_element_type=jnp.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def apart(self, params: Params, keep: bool = True) -> Params:
        """Where layers run as straight code: each layer's parameters as arrays of their own.

        XLA on a CPU copies a layer out of its stack before it multiplies by it, at every step. keep: the
        stacks stay; else each is deleted when its layers stand.
        """
        if not self.unrolled:
            return params
        cut = jax.jit(list)

        def layers(stack: jax.Array) -> list[jax.Array]:
            found = jax.block_until_ready(cut(stack))
            if not keep:
                stack.delete()
            return found

        def apart(stacked: Params) -> list[Params]:
            stacks, tree = jax.tree.flatten(stacked)
            return [tree.unflatten(layer) for layer in zip(*map(layers, stacks), strict=True)]

        return params | {name: apart(params[name]) for name, _, _ in self.groups()}

    def init_state(self, batch: int, length: int) -> Any:
        """Empty state for `batch` rows of up to `length` tokens, stacked or apart as the parameters are."""

        def layers(blocks: tuple[Block, ...], repeats: int) -> Any:
            empty = lambda: {  # noqa: E731
                str(i): block.mixer.init_state(batch, length, self.embed.dtype)
                for i, block in enumerate(blocks)
            }
            if self.unrolled:
                return [empty() for _ in range(repeats)]
            return jax.tree.map(lambda leaf: jnp.zeros((repeats, *leaf.shape), leaf.dtype), empty())

        return {name: layers(blocks, repeats) for name, blocks, repeats in self.groups()}

    def state_axes(self, state: Any) -> Any:
        """The logical axes of each leaf of a state."""
        lead = () if self.unrolled else ("layers",)
        return jax.tree_util.tree_map_with_path(lambda path, _: (*lead, *cache.AXES[path[-1].key]), state)

    def decode(
        self,
        params: Params,
        state: Any,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        lengths_B: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Hidden states [B, T, D] of T more tokens per row, and the state that has seen them.

        Positions of a row are consecutive, from as many as the state has seen of it (0 starts the row anew).
        Only the first lengths_B tokens of a row count; the rest are padding, their hidden states meaningless.
        """
        start_B = positions_BT[:, 0]
        context = self.context(positions_BT, start=start_B, lengths=lengths_B)
        hidden_BTD, new = self.run(params, tokens_BT, positions_BT, context, state, None)
        if not self.unrolled:  # a scan would copy the state that it gives back
            write = jax.vmap(cache.write, (0, 0, None, None))
            new = {
                name: {i: write(state[name][i], new[name][i], start_B, lengths_B) for i in state[name]}
                for name in state
            }
        return hidden_BTD, new
