"""Parameters and FLOPs of any model, under every named convention.

`measure` takes them from a built model: parameters from the shapes of its `init` and their roles, FLOPs by
walking the trace of its forward and backward pass, so that a foreign model has exact numbers too.
`closed_form` computes the same numbers for a `Transformer` from its config in microseconds; `count` is the
cheaper of the two that a model has.

All FLOPs are per token of training, forward and backward, two for each multiply-add, and N is what a token
meets: of experts, the chosen ones (N_active). Conventions disagree about embeddings, the head and masked
attention; T is the sequence length, HK heads x head width, L layers:

    6n                 6 N_total
    6n_non_embedding   6 N_non_embedding
    6n_matmul          6 N_matmul: what Porian et al. (arXiv:2406.19146) call standard
    kaplan             6 N_body_matmul + 6 L HK T: no head, the visible half of attention (arXiv:2001.08361)
    chinchilla         3 (2 VD + 2 N_body_matmul + L (4 HK T + 3 H T) + 2 VD): the embedding as a product, the
                       softmax too (arXiv:2203.15556, appendix F)
    chinchilla_a4      that without embedding and logits, as in the paper's table A4
    palm               6 N_without_positions + 12 L HK T: all of attention (arXiv:2204.02311, appendix B)
    nanochat           6 N_matmul + 12 HK sum of min(window, T) over layers
    maxtext            6 N_matmul + 6 L HK T: the visible half of attention; Porian's "attention"
    exact              every matrix product of the definition: all T x T scores, the masked ones too; nothing
                       else (no softmax, norms, activations), and however it is executed (chunks, remat)
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from llm_jax.kernels import splash
from llm_jax.models import Layout, Model, ModelConfig
from llm_jax.models.blocks import GATED
from llm_jax.models.positions import Learned
from llm_jax.models.transformer import Transformer

Spec = dict[str, jax.ShapeDtypeStruct]

# How the definition is executed: a scan, whose trace is short, and attention with all its scores.
DEFINITION = Layout(unroll=False, remat="none", attention="reference")

TABLES = {"embedding": "N_embedding", "position": "N_positions", "head": "N_head"}  # role -> its group


def count(config: ModelConfig, spec: Spec, tokens: int | None = None) -> dict[str, int | float]:
    """Every N_* of a model and every flops_*_per_token, as `measure` gives them."""
    if type(config) is Transformer:  # a subclass may build something else
        return closed_form(config, spec["tokens"].shape[-1])
    return measure(config, spec, tokens)


def measure(config: ModelConfig, spec: Spec, tokens: int | None = None) -> dict[str, int | float]:
    """Every N_* of a model and every flops_*_per_token of training it on batches of `spec`.

    flops_exact is None for a model with a loop whose length only running it tells.

    tokens: how many a batch counts for; by default the size of spec["tokens"], or its rows if it has none.
    The conventions with a formula (all but 6n and exact) are given for a `Transformer`.
    """
    model = config.build(DEFINITION)
    parameters = count_parameters(model)
    if isinstance(config, Transformer):
        parameters, flops = flops_by_formula(config, parameters, spec["tokens"].shape[-1])
    else:
        parameters, flops = parameters | {"N_active": parameters["N_total"]}, flops_by_size(parameters)
    if tokens is None:
        tokens = math.prod(spec["tokens"].shape if "tokens" in spec else next(iter(spec.values())).shape[:1])
    try:
        flops["exact"] = count_flops(model, spec) / tokens
    except ValueError:
        flops["exact"] = None
    return parameters | {f"flops_{name}_per_token": value for name, value in flops.items()}


def closed_form(config: Transformer, sequence_length: int) -> dict[str, int | float]:
    """What `measure` finds, computed from the config alone."""
    D, H, G, K = config.width, config.heads, config.key_value_heads, config.size_of_head
    F, V, L = config.size_of_mlp, config.vocabulary, config.layers
    ups = 2 if config.activation in GATED else 1
    sparse = sum(config.has_experts(layer) for layer in range(L))
    dense = L - sparse
    mlps = dense * (ups + 1) * D * F
    if sparse:
        experts = config.experts
        mlps += sparse * (D * experts.count + experts.count * (ups + 1) * D * config.size_of_expert)
    matrices = L * (D * H * K + 2 * D * G * K + H * K * D) + mlps
    attention_biases = {"none": 0, "qkv": H * K + 2 * G * K, "all": H * K + 2 * G * K + D}
    biases = L * attention_biases[config.attention_bias] + dense * (ups * F + D) * config.bias
    norm = D * (2 if config.norm.kind == "layer" and config.bias else 1)
    norms = L * norm * (4 if config.norm_position == "sandwich" else 2)
    norms += norm * (config.norm_position != "post")
    norms += L * config.qk_norm * (2 * K if config.attention.norm_over == "head" else (H + G) * K)
    parameters = _named(
        embedding=V * D,
        positions=config.positions.length * D if isinstance(config.positions, Learned) else 0,
        head=0 if config.tied else V * D,
        body=matrices + biases + norms,
        body_matmul=matrices,
    )
    parameters, flops = flops_by_formula(config, parameters, sequence_length)
    flops["exact"] = flops["6n_matmul"] + 12 * L * H * K * sequence_length
    return parameters | {f"flops_{name}_per_token": value for name, value in flops.items()}


# ---- parameters ----


def count_parameters(model: Model) -> dict[str, int]:
    """The number of parameters by group, and what each convention calls N, from the shapes of `init`.

    N_total = N_embedding + N_positions + N_head + N_body, where a tied head is 0 and the last norm is body.
    N_non_embedding is N_body. N_body_matmul is its matrices alone (without norms and biases), N_matmul adds
    the logits' matrix, tied or not. N_trained is told where that isn't all.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    groups = {"N_embedding": 0, "N_positions": 0, "N_head": 0, "N_body": 0, "matrices": 0}
    for leaf, role in zip(jax.tree.leaves(params), jax.tree.leaves(model.roles(params)), strict=True):
        group = TABLES.get(role.name, "N_body")
        groups[group] += leaf.size
        if group == "N_body" and role.decay:
            groups["matrices"] += leaf.size
    embedding, positions, head, body, matrices = groups.values()
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.split(params)[1]))
    part = {"N_trained": trained} if model.frozen else {}
    return _named(embedding, positions, head, body, matrices) | part


def _named(embedding: int, positions: int, head: int, body: int, body_matmul: int) -> dict[str, int]:
    total = embedding + positions + head + body
    return {
        "N_total": total,
        "N_non_embedding": body,
        "N_without_positions": total - positions,
        "N_matmul": body_matmul + (head or embedding),
        "N_body_matmul": body_matmul,
        "N_embedding": embedding,
        "N_positions": positions,
        "N_head": head,
        "N_body": body,
    }


# ---- FLOPs by formula ----


def flops_by_size(N: dict[str, int]) -> dict[str, int]:
    """The conventions that need no more than N, per token."""
    return {
        "6n": 6 * N["N_total"],
        "6n_non_embedding": 6 * N["N_non_embedding"],
        "6n_matmul": 6 * N["N_matmul"],
    }


def flops_by_formula(
    config: Transformer, N: dict[str, int], sequence_length: int
) -> tuple[dict[str, int], dict[str, int]]:
    """N with N_active, and all conventions for attention over `sequence_length` tokens, per token.

    They multiply what a token meets: experts that it isn't sent to count in N, but not in N_active or FLOPs.
    """
    T, L, H = sequence_length, config.layers, config.heads
    HK, logits = H * config.size_of_head, config.vocabulary * config.width
    idle = idle_parameters(config)
    used = {
        name: size - idle * (name not in ("N_head", "N_embedding", "N_positions")) for name, size in N.items()
    }
    seen = sum(T if (window := config.window(layer)) is None else min(window, T) for layer in range(L))
    chinchilla_a4 = 3 * (2 * used["N_body_matmul"] + L * (4 * HK * T + 3 * H * T))
    flops = flops_by_size(used) | {
        "kaplan": 6 * used["N_body_matmul"] + 6 * L * HK * T,
        "chinchilla": chinchilla_a4 + 3 * (2 * logits + 2 * logits),
        "chinchilla_a4": chinchilla_a4,
        "palm": 6 * used["N_without_positions"] + 12 * L * HK * T,
        "nanochat": 6 * used["N_matmul"] + 12 * HK * seen,
        "maxtext": 6 * used["N_matmul"] + 6 * L * HK * T,
    }
    return N | {"N_active": used["N_total"]}, flops


def idle_parameters(config: Transformer) -> int:
    """Parameters of the experts that a token is not sent to."""
    if config.experts is None:
        return 0
    blocks = sum(config.has_experts(layer) for layer in range(config.layers))
    return blocks * (config.experts.count - config.experts.active) * 3 * config.width * config.size_of_expert


# ---- exact FLOPs: the products in a trace ----


def count_flops(model: Model, spec: Spec) -> int:
    """FLOPs of all matrix products in one forward and backward pass over a batch of `spec`.

    Of the products behind the logits of every position, and of the model's own loss terms. Build the model
    with `DEFINITION` to count what the mathematics asks for, and not what one way of executing it does.
    """

    def outcome(trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        params = frozen | trained if frozen else trained
        output = model.apply(params, batch, None)
        scores = output.hidden if model.unembed is None else model.unembed(params, output.hidden)
        # Any function of the scores will do: its gradient reaches back through the same products.
        return scores.astype(jnp.float32).sum() + sum(term.sum for term in output.aux.values())

    frozen, trained = model.split(jax.eval_shape(model.init, jax.random.key(0)))
    return matmul_flops(jax.make_jaxpr(jax.value_and_grad(outcome))(trained, frozen, spec).jaxpr)


def matmul_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of the matrix products and convolutions in a trace, loops multiplied by their length.

    What is done on each device's part counts on every device, splash attention in the blocks that it visits.
    A conditional counts its dearest branch, a ragged product all rows (also those that other devices' experts
    take), and what nothing is made of doesn't count: compilers drop it. Raises ValueError for what a trace
    doesn't tell: loops of unknown length, other kernels.
    """
    flops, used = 0, {variable for variable in jaxpr.outvars if isinstance(variable, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars) and not equation.effects:
            continue
        used.update(variable for variable in equation.invars if isinstance(variable, core.Var))
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * equation.outvars[0].aval.size * summed
        elif name == "ragged_dot_general":  # every row of the left side meets one group of the right
            left, right = (variable.aval for variable in equation.invars[:2])
            rule = params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batch) = rule.dot_dimension_numbers
            bound = {*contracted, *batch, *rule.rhs_group_dimensions}
            flops += 2 * left.size * math.prod(n for axis, n in enumerate(right.shape) if axis not in bound)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            flops += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        else:
            inside = [matmul_flops(inner) for inner in _inner(params)]
            flops += max(inside) if name == "cond" else sum(inside) * _times(name, params)
    return flops


def _times(name: str, params: dict[str, Any]) -> int:
    """How often what is inside an equation is done, on all devices together."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call" and splash.NAME in params["name"]:
        return splash.visited(params["name"], params["grid_mapping"].grid)
    if name in ("while", "pallas_call"):
        raise ValueError(f"the FLOPs of {name!r} can't be read from a trace")
    return 1


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The traces inside an equation's parameters (a call's, a loop's, a conditional's)."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
