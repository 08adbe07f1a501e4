"""Programs compiled for slices that aren't here: what they exchange, whether they fit, what is refused."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import changed
from jax.sharding import PartitionSpec as P

from llm_jax import aot, sharding
from llm_jax.config import UserError
from llm_jax.kernels import devices, hlo, slices
from llm_jax.models.experts import Experts


def test_exchanges_in_a_loop_count_as_often_as_it_runs():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))

    def shard(x):  # [2, 128] float32 on each of eight devices
        once = (
            jax.lax.all_gather(x, "fsdp", tiled=True).sum()
            + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]).sum()
        )

        def body(total, _):
            return jnp.tanh(jax.lax.psum(total * x, "fsdp")).sum(), None

        return jax.lax.scan(body, once, None, length=5)[0][None]

    rows = P(("data", "fsdp"))
    spread = jax.shard_map(shard, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct((16, 128), np.float32)).compile().as_text()
    found = hlo.collectives(text)
    piece = 2 * 128 * 4  # bytes
    assert found["all-gather"] == {"count": 1, "bytes": 3 * piece}  # of three others
    assert found["collective-permute"] == {"count": 1, "bytes": piece}
    assert found["all-reduce"] == {"count": 5, "bytes": 5 * 2 * piece * 3 / 4}


# As libtpu writes them, shortened: an exchange of a loop in three parts of one channel, and a fused scatter.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%condition.1 (state: (s32[], bf16[8])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(6)
  %state = (s32[], bf16[8]{0}) parameter(0)
  ROOT %lt.10 = pred[]{:T(512)} compare(%counter, %constant.6), direction=LT
}

%start.1 (p: bf16[128,512]) -> bf16[512,512] {
  ROOT %gather = bf16[512,512] all-gather(%p), channel_id=8, replica_groups=mesh['a'=4] {'a'}, {chain_id="0"}
}

%step.2 (p: bf16[128,512]) -> bf16[512,512] {
  ROOT %gather = bf16[512,512] all-gather(%p), channel_id=8, replica_groups=mesh['a'=4] {'a'}, {chain_id="0"}
}

%all-reduce-scatter.1 (input: f32[512,512]) -> f32[128,512] {
  %all-reduce.4 = f32[512,512]{1,0} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%body.1 (state: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %begun = bf16[512,512] fusion(%x), kind=kCustom, calls=%start.1
  %going = bf16[512,512] fusion(%x), kind=kCustom, calls=%step.2
  %fusion.27 = f32[128,512]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main.5 (p: bf16[8]) -> bf16[8] {
  %while.28 = (s32[], bf16[8]{0}) while(%tuple), condition=%condition.1, body=%body.1
  %all-reduce.9 = f32[2,4]{1,0} all-reduce(%z), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add.1
}
"""


def test_parts_of_an_asynchronous_exchange_are_one_and_a_fused_scatter_is_a_scatter():
    gather, scatter, reduce = hlo.exchanges(TPU_TEXT)
    assert gather == hlo.Exchange("all-gather", 4, 512 * 512 * 2, 6)
    assert scatter == hlo.Exchange("reduce-scatter", 4, 128 * 512 * 4, 6)
    assert reduce == hlo.Exchange("all-reduce", 4, 2 * 4 * 4, 1)
    assert scatter.received_bytes == 3 * 128 * 512 * 4


def test_of_a_combined_exchange_that_is_only_started_all_results_count_and_no_operand():
    # As XLA's printer writes what its combiners and its scheduler make, parameters left out.
    text = (pathlib.Path(__file__).parent / "kernels" / "exchanges.hlo").read_text()
    assert hlo.exchanges(text) == [
        hlo.Exchange("all-reduce", 4, 1024 * 4 + 512 * 2 + 3, 1),
        hlo.Exchange("all-gather", 4, 4096 * 4 + 2048 // 2, 1),
        hlo.Exchange("all-gather", 8, 8192 * 4, 1),
        hlo.Exchange("collective-permute", 8, 1024 * 4, 1),
        hlo.Exchange("collective-permute", 8, 1536 * 4, 1),
        hlo.Exchange("ragged-all-to-all", 4, 1024, 1),
        hlo.Exchange("reduce-scatter", 4, 256 * 4, 1),
        hlo.Exchange("all-to-all", 2, 1024 * 4, 1),
        hlo.Exchange("all-reduce", 8, 2 * 4, 1),
        hlo.Exchange("all-reduce", 2, 64 * 4, 5),
    ]


def test_unknown_slices_and_a_missing_libtpu_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"no TPU slice 'v5e:4x5'; of v5e there are 1x1, 2x2, 2x4, 4x4"):
        slices.describe("v5e:4x5")
    with pytest.raises(UserError, match=r"such as v5e:4x4, of v2, v3, v4, v5e"):
        slices.describe("v5litepod-16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]"):
        slices.describe("v5e:4x4")


def test_search_orders_what_fits_by_tokens_a_second_and_passes_over_what_cannot_be_compiled(
    tiny_run, monkeypatch, capfd
):
    run, tried = changed(tiny_run, data__batch_size=16), []
    refuses = False

    def compiled_for(one, topology, count):
        mesh, remat, rows = one.execution.mesh, one.execution.layout.remat, one.data.batch_size
        tried.append((mesh.tensor, remat, rows))
        if (mesh.tensor, remat) == (1, "full") or refuses:
            raise UserError("it can't be compiled: scoped vmem")
        fits = rows <= {"none": 8, "dots": 16, "full": 32}[remat] * mesh.tensor
        seconds = (rows + 8) * {"none": 1.0, "dots": 1.5, "full": 4.0}[remat] * mesh.tensor
        facts = {
            "batch_size": rows,
            "remat": remat,
            "tokens_per_step": rows,
            "fits": fits,
            "bound_by": "products",
            "mesh": {},
        }
        return facts | {"peak_bytes": 0, "hbm_bytes": 0, "estimated_step_seconds": seconds}

    monkeypatch.setattr(aot, "compiled_for", compiled_for)
    monkeypatch.setattr(slices, "describe", lambda *_: [None] * 8)
    found = aot.search(run, "v5e:2x4")
    best = found[0]
    assert (best["asked"]["tensor"], best["remat"], best["batch_size"]) == (1, "none", 8)
    assert not found[-1]["fits"] and aot.tokens_per_second(found[-1]) == 0
    assert len(set(tried)) == len(tried) and (1, "none", 64) in tried
    assert (1, "dots", 8) not in tried  # 8 rows fit without
    said = capfd.readouterr().err
    assert said.count("fits: ") == sum(facts["fits"] for facts in found)
    assert "\n8 fsdp, remat full, 64 rows: it can't be compiled: scoped vmem\n" in said
    refuses = True
    with pytest.raises(UserError, match="scoped vmem"):
        aot.search(run, "v5e:2x4")


def test_experts_are_shared_out_in_some_of_the_meshes_that_are_tried(tiny_run):
    run = changed(tiny_run, model__experts=Experts(6, width=64), data__batch_size=16)
    meshes = {(one.execution.mesh.fsdp, one.execution.mesh.expert) for one in aot.candidates(run, 8)}
    assert {(8, 1), (4, 2), (4, 1), (2, 2)} <= meshes


def test_the_roofline_is_the_slowest_of_products_memory_links_and_network(tiny_run):
    chip = next(row for row in devices.DEVICES if "v5( lite|e)" in row.pattern)
    run = changed(tiny_run, model__dtype="bfloat16")
    facts = {"flops": 16 * 197e12, "executed_flops": None, "devices": 16, "state_bytes": 1e9}
    facts |= {"temporary_bytes": 1e9, "collectives": {"all-gather": {"count": 1, "bytes": 1e11}}}
    facts |= {"between_slices": {"all-reduce": {"count": 1, "bytes": 1e9}}}
    found = aot._roofline(run, facts, chip, slices.generation("v5e:4x4"))
    assert found["estimated_seconds"] == pytest.approx(
        {"products": 1.0, "memory": 4e9 / 819e9, "exchange": 1e11 / 200e9, "network": 1e9 * 8 / 25e9}
    )
    assert found["bound_by"] == "products" and found["estimated_mfu"] == 1.0
    facts["between_slices"]["all-reduce"]["bytes"] = 1e10
    slow = aot._roofline(run, facts, chip, slices.generation("v5e:4x4"))
    assert slow["bound_by"] == "network" and slow["estimated_step_seconds"] == 3.2


@pytest.fixture(scope="module")
def libtpu():
    """Where libtpu is: a folder that LLM_JAX_LIBTPU names, so that nothing else finds TPUs to look for."""
    place = os.environ.get("LLM_JAX_LIBTPU", "")
    if not place and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu here: pip install --no-deps --target=FOLDER libtpu, and LLM_JAX_LIBTPU=FOLDER")
    return place


# Float32 [512, 1024] on each device, 2 MiB.
TWO_SLICES = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from llm_jax import sharding
from llm_jax.kernels import hlo, slices

mesh = sharding.make_mesh(sharding.MeshConfig(slice=2, fsdp=4), slices.describe("v5e:2x2", 2))
place = jax.NamedSharding(mesh, P(("slice", "fsdp")))

def shard(x):
    def body(x, _):
        return jnp.tanh(jax.lax.psum(x, "slice")), None

    looped = jax.lax.scan(body, x, None, length=5)[0]
    swapped = jax.lax.ppermute(x, "slice", [(0, 1), (1, 0)])
    return jax.lax.all_gather(x, "fsdp", tiled=True), looped, swapped, jax.lax.psum(2 * x, ("slice", "fsdp"))

spread = jax.shard_map(shard, mesh=mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False)
x = jax.ShapeDtypeStruct((8 * 512, 1024), jnp.float32, sharding=place)
text = jax.jit(spread).trace(x).lower(lowering_platforms=("tpu",)).compile().as_text()
devices = {name: len(slices.describe(name)) for name in ("v3:2x2", "v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1")}
print(json.dumps([hlo.collectives(text), hlo.collectives(text, between_slices=True), devices]))
"""


def test_only_what_leaves_a_slice_goes_over_the_network_and_a_device_may_be_half_a_chip(libtpu):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [libtpu, *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-c", TWO_SLICES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    inside, between, devices = json.loads(done.stdout)
    piece = 512 * 1024 * 4  # bytes
    # A sum over all eight is cut in four inside the slices, summed between them, and gathered inside.
    assert inside["all-gather"] == {"count": 2, "bytes": 3 * piece + 3 * piece / 4}
    assert inside["reduce-scatter"] == {"count": 1, "bytes": 3 * piece / 4}
    assert between["all-reduce"] == {"count": 6, "bytes": 5 * piece + piece / 4}
    assert between["collective-permute"] == {"count": 1, "bytes": piece}
    assert len(inside) == len(between) == 2
    # As the peaks and bandwidths of one device are told.
    assert devices == {"v3:2x2": 8, "v4:2x2x1": 4, "v5p:2x2x1": 4, "tpu7x:2x2x1": 8}


def test_steps_compiled_for_a_slice_say_what_they_need_the_best_is_found_and_one_too_large_does_not_fit(
    libtpu, tmp_path
):
    environment = os.environ | {"LLM_JAX_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [libtpu, *sys.path]))

    def compiled(*fields):
        command = [sys.executable, "-m", "llm_jax.aot", "--config=experiments/llama3.py:smoke", "--json"]
        fields = [
            "--topology=v5e:2x2",
            "--config.execution.mesh.data=1",
            "--config.execution.mesh.fsdp=-1",
            *fields,
        ]
        done = subprocess.run(
            [*command, *fields], env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    best = compiled("--search", "--config.data.sequence_length=128", "--config.model.layers=1")
    assert best["fits"] and best["chips"] == best["devices"] == 4 and best["hbm_bytes"] == 16 * 2**30
    assert best["remat"] == "none" and best["batch_size"] == 4 * 8  # of a model as small as this
    assert best["attention"] == "splash" and best["compile_seconds"] > 0
    assert best["collectives"]["all-gather"]["bytes"] > 0
    assert best["flops"] < best["executed_flops"] < 2 * best["flops"]  # scores and logits are computed again
    assert 0 < best["estimated_mfu"] < 1
    meshes = [facts["mesh"] for facts in best["tried"]]
    assert meshes[0] == best["mesh"] and {"fsdp": 4} in meshes and {"fsdp": 2, "tensor": 2} in meshes
    assert best["estimated_step_seconds"] == min(facts["estimated_step_seconds"] for facts in best["tried"])
    large = compiled(
        "--config.model.width=16384", "--config.model.heads=128", "--config.model.mlp_width=65536"
    )
    assert not large["fits"] and large["peak_bytes"] > large["hbm_bytes"]
