"""Counts of parameters and FLOPs against published figures, XLA, and each other."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import splash
from llm_jax.kernels.chunked import Rule
from llm_jax.models import Layout, Model, ModelConfig, Output
from llm_jax.models.counting import (
    DEFINITION,
    closed_form,
    count_flops,
    count_parameters,
    matmul_flops,
    measure,
)
from llm_jax.models.experts import Experts
from llm_jax.models.positions import Learned, NoPositions, Rotary
from llm_jax.models.transformer import Attending, LayerNorm, RMSNorm, Transformer
from llm_jax.sharding import MeshConfig, make_mesh


def spec(length, rows=2):
    return {"tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32)}


GPT2 = Transformer(
    vocabulary=50257, positions=Learned(1024), norm=LayerNorm(), activation="gelu", bias=True, tied=True
)
LLAMA = Transformer(tied=False)
# name: (config, sequence length), the architectures of SOURCE.md beside flops_params.csv
PUBLISHED = {
    "gpt2": (dataclasses.replace(GPT2, layers=12, width=768, heads=12), 1024),
    "gpt2-medium": (dataclasses.replace(GPT2, layers=24, width=1024, heads=16), 1024),
    "gpt2-large": (dataclasses.replace(GPT2, layers=36, width=1280, heads=20), 1024),
    "gpt2-xl": (dataclasses.replace(GPT2, layers=48, width=1600, heads=25), 1024),
    "gpt2-nanoGPT-bias=False": (dataclasses.replace(GPT2, layers=12, width=768, heads=12, bias=False), 1024),
    "llama2-7b": (
        dataclasses.replace(LLAMA, vocabulary=32000, layers=32, width=4096, heads=32, mlp_width=11008),
        4096,
    ),
    "llama3-8b": (
        dataclasses.replace(
            LLAMA, vocabulary=128256, layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336
        ),
        8192,
    ),
    "llama3-70b": (
        dataclasses.replace(
            LLAMA, vocabulary=128256, layers=80, width=8192, heads=64, kv_heads=8, mlp_width=28672
        ),
        8192,
    ),
    "llama3.1-405b": (
        dataclasses.replace(
            LLAMA, vocabulary=128256, layers=126, width=16384, heads=128, kv_heads=8, mlp_width=53248
        ),
        8192,
    ),
    "chinchilla-70b": (
        dataclasses.replace(GPT2, vocabulary=32000, layers=80, width=8192, heads=64, positions=NoPositions()),
        2048,
    ),
    "gopher-280b": (
        dataclasses.replace(
            GPT2, vocabulary=32000, layers=80, width=16384, heads=128, positions=NoPositions()
        ),
        2048,
    ),
}
COLUMNS = {
    "params_total": "N_total",
    "params_minus_pos": "N_without_positions",
    "params_non_embedding": "N_non_embedding",
    "kaplan_12Ld2": "N_body_matmul",
    "matmul_params": "N_matmul",
    "f_6N_total": "flops_6n_per_token",
    "f_6N_nonemb": "flops_6n_non_embedding_per_token",
    "f_6N_matmul": "flops_6n_matmul_per_token",
    "f_kaplan": "flops_kaplan_per_token",
    "f_palm": "flops_palm_per_token",
    "f_exact_matmul_full_attn": "flops_exact_per_token",
    "f_maxtext_causal": "flops_maxtext_per_token",
    "f_chinchillaF": "flops_chinchilla_per_token",
    "f_chinchillaF_no_emb_logits": "flops_chinchilla_a4_per_token",
}


def difference(config, length, column):
    """What the table's row counts and this architecture or convention does not."""
    L, D = config.layers, config.width
    if isinstance(config.positions, NoPositions):
        # Chinchilla and Gopher have relative positions: a matrix and two biases in each layer.
        extra = L * (D * D + 2 * D)
        matrices = {
            "matmul_params": L * D * D,
            "f_6N_matmul": 6 * L * D * D,
            "f_maxtext_causal": 6 * L * D * D,
        }
        return {
            "params_total": extra,
            "params_non_embedding": extra,
            "f_6N_total": 6 * extra,
            **matrices,
        }.get(column, 0)
    if (
        not config.tied
    ):  # of Llama the table calls 12 L D^2 what ignores GQA and gates, and adds norms for Kaplan
        norms = (2 * L + 1) * D
        twelve = 12 * L * D * D - closed_form(config, 1)["N_body_matmul"]
        return {"f_kaplan": 6 * norms, "kaplan_12Ld2": twelve}.get(column, 0)
    return 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_every_row_of_the_published_table(name, reference_data):
    with open(reference_data / "scaling" / "flops_params" / "flops_params.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["name"] == name)
    config, length = PUBLISHED[name]
    counted = measure(config, spec(length, rows=1))
    compared = {column: float(row[column]) for column in COLUMNS if row[column]}
    assert len(compared) >= 6
    for column, published in compared.items():
        assert counted[COLUMNS[column]] + difference(config, length, column) == published, column
    assert counted == closed_form(config, length)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "N", "flops", "ratio"),
    [
        (10, 640, 10, 73_825_280, 929_877_196_800, 1.0250),
        (20, 1024, 16, 305_707_008, 4_135_248_199_680, 1.1008),
        (24, 1280, 10, 552_604_160, 7_353_453_772_800, 1.0829),
        (26, 1792, 14, 1_143_453_696, 14_670_316_437_504, 1.0441),
        (28, 2048, 16, 1_593_126_912, 20_220_437_594_112, 1.0329),
        (40, 3584, 28, 6_796_274_688, 83_021_046_743_040, 0.9941),
    ],
)
def test_chinchilla_s_table_a4_is_reproduced(layers, width, heads, N, flops, ratio):
    """FLOPs of a sequence of 2048 tokens, and beside 6 N D (arXiv:2203.15556, table A4, unrounded)."""
    config = dataclasses.replace(
        GPT2, vocabulary=32000, layers=layers, width=width, heads=heads, positions=NoPositions()
    )
    counted = closed_form(config, 2048)
    assert counted["flops_chinchilla_a4_per_token"] * 2048 == flops
    assert counted["N_total"] + difference(config, 2048, "params_total") == N
    assert flops / (6 * N * 2048) == pytest.approx(ratio, abs=5e-5)


def test_known_models_have_their_known_sizes():
    sizes = {name: closed_form(config, length)["N_total"] for name, (config, length) in PUBLISHED.items()}
    assert sizes["gpt2"] == 124_439_808
    assert sizes["gpt2-xl"] == 1_557_611_200
    assert sizes["llama3-8b"] == 8_030_261_248
    assert sizes["llama3.1-405b"] == 405_853_388_800
    assert 6 * sizes["llama3.1-405b"] * 15.6e12 == pytest.approx(3.7988e25, rel=1e-5)
    assert pytest.approx(5.88e23) == 6 * 70e9 * 1.4e12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1, "head_width": 12, "activation": "gelu", "positions": Learned(24)},
        {"norm": LayerNorm(), "bias": True, "tied": False, "activation": "geglu", "norm_position": "post"},
        {"windows": (8, None, 4), "layers": 5, "qk_norm": True, "norm": LayerNorm(), "softcap": 5.0},
        {"bias": True, "activation": "relu2", "qk_norm": True, "mlp_width": 40},
        {"experts": Experts(5, 2, 24, pattern=(False, True)), "windows": (8, None, None)},
        {"qk_norm": True, "attention": Attending(norm_over="heads", bias="qkv"), "norm_position": "output"},
        {"norm": RMSNorm(gain=True), "norm_position": "sandwich", "rotations": (Rotary(50.0), None)},
    ],
)
def test_the_closed_form_equals_what_is_counted_in_the_built_model(changes):
    config = dataclasses.replace(Transformer(vocabulary=50, layers=3, width=32), **changes)
    assert closed_form(config, 24) == measure(config, spec(24))


def test_groups_add_up_to_the_total():
    N = closed_form(dataclasses.replace(GPT2, tied=False), 8)
    assert N["N_total"] == N["N_embedding"] + N["N_positions"] + N["N_head"] + N["N_body"]
    assert min(N["N_embedding"], N["N_positions"], N["N_head"], N["N_body"]) > 0


def test_exact_flops_are_within_three_percent_of_what_xla_counts():
    """XLA adds softmax, norms and activations: more than ours, by less than 3 % at this width."""
    config = dataclasses.replace(GPT2, vocabulary=512, layers=2, width=256, heads=4, positions=Learned(64))
    model = config.build(Layout(unroll=True, attention="reference"))

    def outcome(params, batch):
        return model.unembed(params, model.apply(params, batch, None).hidden).sum()

    shapes = jax.eval_shape(model.init, jax.random.key(0)), spec(64)
    compiled = jax.jit(jax.value_and_grad(outcome)).lower(*shapes).compile()
    ours, xla = count_flops(model, spec(64)), compiled.cost_analysis()["flops"]
    assert ours < xla < 1.03 * ours


def test_how_a_model_is_executed_does_not_change_its_definition():
    config = Transformer(vocabulary=50, layers=2, width=32)
    assert count_flops(config.build(Layout(unroll=True, attention="reference")), spec(24)) == count_flops(
        config.build(DEFINITION), spec(24)
    )
    again = config.build(Layout(unroll=False, remat="full", attention="reference"))
    assert count_flops(again, spec(24)) > count_flops(config.build(DEFINITION), spec(24))


@dataclasses.dataclass(frozen=True)
class Classifier(ModelConfig, kind="counted_classifier"):
    """A foreign model: its input needs no gradient, so its first layer costs two products, not three."""

    def build(self, layout=DEFINITION):
        def init(key):
            return {"first": jnp.zeros((10, 20)), "bias": jnp.zeros(20), "head": jnp.zeros((20, 3))}

        def apply(params, batch, key):
            return Output(jax.nn.relu(batch["x"] @ params["first"] + params["bias"]), {})

        return Model(init, apply, lambda params, hidden: hidden @ params["head"])


def test_a_foreign_model_has_exact_counts_too():
    counted = measure(Classifier(), {"x": jax.ShapeDtypeStruct((7, 10), jnp.float32)})
    assert counted["flops_exact_per_token"] == 2 * 2 * 10 * 20 + 3 * 2 * 20 * 3
    assert counted["N_total"] == 10 * 20 + 20 + 20 * 3
    assert counted["N_head"] == 60
    assert counted["flops_6n_per_token"] == 6 * counted["N_total"]
    assert "flops_palm_per_token" not in counted
    assert count_parameters(Classifier().build())["N_body_matmul"] == 200


def test_loops_multiply_conditionals_take_the_dearest_and_unknown_loops_are_refused():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    once = 2 * 4**3

    def flops(function, *arguments):
        return matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]

    assert flops(loop, x) == 5 * once
    assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x), x) == 2 * once
    assert flops(jax.vmap(loop), jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)) == 15 * once
    assert flops(lambda x: (x @ x @ x, x @ x)[1], x) == once  # compilers drop the others
    convolution = lambda x, k: jax.lax.conv(x, k, (1,), "SAME")  # noqa: E731
    assert flops(convolution, jnp.ones((2, 3, 8)), jnp.ones((5, 3, 4))) == 2 * (2 * 5 * 8) * 3 * 4
    with pytest.raises(ValueError, match="while"):
        flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), x)


@pytest.mark.parametrize("window", [None, 513, 514])
def test_splash_attention_counts_the_blocks_with_visible_scores_on_every_device(window):
    """Two products of a block forward; backward scores and their gradients twice, and three more."""
    length, heads, width = 2048, 4, 128
    q, kv = (jax.ShapeDtypeStruct((4, length, n, width), jnp.bfloat16) for n in (heads, 2))
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    seen = (distance >= 0) & (distance < (window or length))
    blocks = seen.reshape(4, 512, 4, 512).any((1, 3)).sum()

    def loss(q, k, v):
        return splash.splash(q, k, v, None, Rule(1.0, None, window)).sum()

    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        trace = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv)
    beside = 2 * 4 * heads * length * width  # gradients times outputs, summed
    assert matmul_flops(trace.jaxpr) == 4 * heads * blocks * (2 + 2 * 2 + 3) * 2 * 512**2 * width + beside
