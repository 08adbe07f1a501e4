"""A mesh nobody asked for suits devices and model; one that was asked for fits, or a line says why not."""

import dataclasses
import types

import jax
import pytest
from changes import changed

from llm_jax import placement, sharding
from llm_jax.config import UserError
from llm_jax.kernels import memory
from llm_jax.models.experts import Experts
from llm_jax.pack import pack
from llm_jax.program import Program
from llm_jax.sharding import MeshConfig


def sizes(mesh):
    return {name: size for name, size in mesh.shape.items() if size > 1}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"execution__mesh__tensor": 8}, r"model.heads=4 doesn't divide over execution.mesh.tensor=8"),
        ({"execution__mesh__expert": 2}, "expert=2 shares out experts, and the model has none"),
        ({"execution__mesh__expert": 2, "model__experts": Experts(3)}, "and the model has 3"),
        (
            {"execution__mesh__sequence": 4, "data__sequence_length": 36},
            r"mesh.sequence=4: data.sequence_length=36 doesn't divide into its 8 chunks.*multiple of 8 does",
        ),
        ({"execution__mesh__sequence": 4, "model__dropout": 0.1}, "sequence=4: model.dropout draws by place"),
        ({"execution__mesh__data": 3}, r"8 rows \(data.batch_size\) doesn't divide over 3 devices \(data\)"),
        ({"execution__mesh__fsdp": 16}, "execution.mesh data=-1 x fsdp=16 needs 16 devices, and there are 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_one_line(tiny_run, fields, says):
    with pytest.raises(UserError, match=says) as error:
        placement.mesh_of(changed(tiny_run, **fields), 1)
    assert "\n" not in str(error.value)


def test_without_a_mesh_rows_are_spread_and_then_sequences_and_parameters_where_one_device_has_no_room(
    tiny_run, monkeypatch
):
    assert sizes(placement.mesh_of(tiny_run, 1)) == {"data": 8}
    assert sizes(placement.mesh_of(changed(tiny_run, data__batch_size=2), 1)) == {"data": 2, "sequence": 4}
    assert sizes(placement.mesh_of(changed(tiny_run, execution__micro_batches=4), 1)) == {
        "data": 2,
        "sequence": 4,
    }
    with pytest.raises(UserError, match="a multiple of 8 does"):  # dropout keeps sequences together
        placement.mesh_of(changed(tiny_run, data__batch_size=1, model__dropout=0.1), 1)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    needed = 1.1 * placement.held_bytes(placement.shape_of(tiny_run, tiny_run.data), one)  # norms stay whole
    monkeypatch.setattr(memory, "room", lambda mesh: needed)
    assert sizes(placement.mesh_of(tiny_run, 1)) == {"data": 4, "fsdp": 2}
    monkeypatch.setattr(memory, "room", lambda mesh: needed / 4)
    few = changed(tiny_run, data__batch_size=2)
    assert sizes(placement.mesh_of(few, 1)) == {"fsdp": 2, "tensor": 4}


def test_slices_hold_whole_replicas_and_only_rows_are_spread_over_them():
    """A TPU's devices are arranged by where they lie: here two slices of two by two."""
    attributes = [
        {
            "slice_index": s,
            "coords": (x, y, 0),
            "id": 4 * s + 2 * y + x,
            "core_on_chip": 0,
            "process_index": s,
        }
        for s in (0, 1)
        for y in (0, 1)
        for x in (0, 1)
    ]
    devices = [types.SimpleNamespace(platform="tpu", device_kind="TPU v4", **each) for each in attributes]
    assert sharding.slices(devices) == 2
    shape = dataclasses.asdict(MeshConfig(slice=2, data=1, fsdp=2, tensor=2))
    arranged = sharding._arranged(shape, devices).reshape(2, -1)
    assert [{device.slice_index for device in row} for row in arranged] == [{0}, {1}]
    with pytest.raises(UserError, match="slice=1, and the devices lie in 2 slices"):
        sharding._arranged(shape | {"slice": 1, "data": 2}, devices)
    assert [axis for axis, names in sharding.TABLE.items() if "slice" in names] == ["batch", "tokens"]


def test_what_a_device_holds_is_what_it_holds(tiny_run):
    program = Program(*pack(changed(tiny_run, execution__mesh=MeshConfig(data=2, fsdp=4)), 1))
    held = placement.state_bytes(program)
    state = program.init(jax.random.PRNGKey(0), 1.0)
    first = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
    assert held["parameters"] + held["optimizer state"] == sum(first)
    where, each, *whole = placement.lines(program)
    assert where == "on 8 cpu, spread over data=2: batch; fsdp=4: batch, embed"
    assert each.startswith("each holds parameters 0.0")
    assert not any("embed" in line for line in whole)


def test_experts_are_shared_out_where_one_device_has_no_room_before_other_parameters_are(
    tiny_run, monkeypatch
):
    run = changed(tiny_run, model__experts=Experts(6, width=64))
    shape, devices = placement.shape_of(run, run.data), jax.devices()
    assert sizes(placement.mesh_of(run, 1)) == {"data": 8}
    whole = placement.held_bytes(shape, sharding.make_mesh(MeshConfig(), devices[:1]))
    monkeypatch.setattr(memory, "room", lambda mesh: 1.9 * whole)
    mesh = placement.mesh_of(run, 1)
    assert sizes(mesh) == {"data": 4, "expert": 2}
    assert placement.held_bytes(shape, mesh) < 0.95 * whole
    monkeypatch.setattr(memory, "room", lambda mesh: 0)  # the mesh that takes least
    assert sizes(placement.mesh_of(run, 1)) == {"fsdp": 8}
