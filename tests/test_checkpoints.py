import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import hasty
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import checkpoints as checkpoints_module
from llm_jax import manifest
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError


class State(NamedTuple):
    trained: Any
    optimizer: Any
    step: jax.Array
    key: jax.Array


class Moments(NamedTuple):
    mu: Any
    nu: Any


def state_at(step, width=8):
    """A state whose bits are a function of the step; random ones, so nan payloads and denormals too."""
    bits = np.random.default_rng(step).integers(0, 2**32, (3, 4, width), np.uint32)
    leaves = {"query": jnp.asarray(bits[0].view(np.float32)), "bias": jnp.asarray(bits[1, 0, 0])}
    half = {"query": jnp.asarray(bits[2].astype(np.uint16)).view(jnp.bfloat16)}
    trained = {"blocks": leaves, "embedding": jnp.full((16, width), step, jnp.float32)}
    return State(trained, (Moments(half, half), ()), jnp.int32(step), jax.random.PRNGKey(step))


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(lambda x: (x.shape, x.dtype), b)
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    """Checkpoints in a folder; every one opened is closed at the end."""
    made = []

    def open_(**kwargs):
        made.append(Checkpoints(tmp_path / "checkpoints", say=said.append, **kwargs))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def saved(opened, *steps, **kwargs):
    checkpoints = opened(**kwargs)
    for step in steps:
        checkpoints.save(step, state_at(step))
    checkpoints.wait()
    return checkpoints


def files_of(checkpoints, step):
    folder = checkpoints.folder / f"{step:08d}"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_restored_state_is_bit_identical(opened):
    saved(opened, 3)
    step, state = opened().restore(abstract(state_at(3)))
    assert step == 3 and same_bits(state, state_at(3))


def test_an_empty_folder_restores_nothing(opened):
    assert opened().restore(abstract(state_at(0))) is None
    assert opened().latest() is None


def test_buffers_may_be_donated_as_soon_as_save_returns(opened):
    big = {f"x{i}": jnp.arange(100_000, dtype=jnp.float32) + i for i in range(8)}
    wanted = jax.tree.map(np.array, big)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = opened()
    checkpoints.save(1, big)
    jax.block_until_ready(overwrite(overwrite(big)))
    checkpoints.wait()
    assert same_bits(checkpoints.restore(abstract(wanted))[1], wanted)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), (1,)])
def test_a_state_saved_on_4_by_2_devices_is_restored_on_another_mesh(opened, shape):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    state = {
        "both": jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor"))),
        "one": jax.device_put(x.T, NamedSharding(mesh, P(None, "fsdp"))),
        "whole": jax.device_put(x[0], NamedSharding(mesh, P())),
    }
    checkpoints = opened()
    checkpoints.save(1, state, wait=True)

    axes = ("data", "fsdp", "tensor")[: len(shape)]
    other = jax.make_mesh(
        shape, axes, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )
    sharding = NamedSharding(other, P(axes[-1]))
    _, restored = opened().restore(abstract(state, sharding))
    assert all(leaf.sharding == sharding for leaf in restored.values())
    assert same_bits(restored, state)


def test_parameters_are_restored_alone_and_in_the_type_asked_for(opened):
    saved(opened, 5)
    trained = state_at(5).trained
    assert same_bits(opened().restore_params(abstract(trained)), trained)
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), trained)
    embedding = opened().restore_params(halves)["embedding"]
    assert embedding.dtype == jnp.bfloat16 and (embedding == 5).all()
    blocks = opened().restore_params(abstract(trained["blocks"]), part="trained/blocks")
    assert same_bits(blocks, trained["blocks"])


def test_parameters_without_a_checkpoint_are_one_line(opened):
    with pytest.raises(UserError, match="no checkpoint here"):
        opened().restore_params(abstract(state_at(0).trained))


def test_the_newest_and_the_chosen_steps_are_kept(opened):
    checkpoints = saved(opened, 1, 2, 3, 4, 5, keep_last=2, keep_steps=(2,))
    assert checkpoints.steps() == [2, 4, 5]
    assert sorted(p.name for p in checkpoints.folder.iterdir() if p.is_dir()) == [
        "00000002",
        "00000004",
        "00000005",
    ]
    assert same_bits(opened().restore(abstract(state_at(2)), step=2)[1], state_at(2))


def test_a_step_that_is_not_there_is_refused(opened):
    saved(opened, 1, 2)
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are: \[1, 2\]"):
        opened().restore(abstract(state_at(1)), step=7)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_damage_in_any_file_falls_back_and_says_so(opened, said):
    """Every file of a checkpoint in turn, the manifest included: a flipped bit, a lost byte, a lost file."""
    checkpoints = saved(opened, 10, 20)
    names = [path for path in files_of(checkpoints, 20) if path.stat().st_size]
    assert len(names) > 5
    for path in [*names, checkpoints.folder / "00000020.json"]:
        for damage in (flip, truncate, lambda p: p.unlink()):
            if path.suffix == ".json" and damage not in (flip, truncate):
                continue  # without its manifest it doesn't count: the next test
            before = path.read_bytes()
            damage(path)
            step, state = opened().restore(abstract(state_at(10)))
            assert step == 10 and same_bits(state, state_at(10)), path
            assert len(said) == 1 and "\n" not in said[0]
            assert "00000020" in said[0] and "continuing from step 10" in said[0]
            said.clear()
            path.write_bytes(before)
    assert opened().restore(abstract(state_at(20)))[0] == 20 and not said


def test_a_flipped_bit_anywhere_in_the_manifest_falls_back(opened, said):
    checkpoints = saved(opened, 10, 20)
    path = checkpoints.folder / "00000020.json"
    before = path.read_bytes()
    for position in range(0, len(before), 31):
        path.write_bytes(before[:position] + bytes([before[position] ^ 1]) + before[position + 1 :])
        assert opened().restore(abstract(state_at(10)))[0] == 10, position
        assert "00000020 (its manifest is damaged)" in said.pop()


def test_a_checkpoint_without_its_manifest_does_not_count(opened, said):
    """What a kill leaves: orbax's folder is in place, or still a temporary one; the manifest isn't."""
    checkpoints = saved(opened, 10, 20)
    (checkpoints.folder / "00000020.json").unlink()
    assert opened().restore(abstract(state_at(10)))[0] == 10
    assert "00000020 (its save was not finished)" in said[0]
    (checkpoints.folder / "00000020").rename(checkpoints.folder / "00000020.orbax-checkpoint-tmp")
    assert opened().latest() == 10
    (checkpoints.folder / "00000010.json").unlink()
    assert opened().restore(abstract(state_at(10))) is None


def test_leftovers_and_superseded_steps_go_with_the_next_save(opened, said):
    checkpoints = saved(opened, 10, 20, 30, keep_last=3)
    flip(files_of(checkpoints, 30)[-1])
    (checkpoints.folder / "00000020.json").unlink()
    (checkpoints.folder / "00000040.orbax-checkpoint-tmp").mkdir()
    (checkpoints.folder / "notes.txt").write_text("mine")
    before = sorted(p.name for p in checkpoints.folder.iterdir())
    again = opened(keep_last=3)
    assert again.restore(abstract(state_at(10)))[0] == 10
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == before, "reading changed the folder"
    again.save(20, state_at(20), wait=True)
    assert again.steps() == [10, 20]
    names = {p.name for p in again.folder.iterdir()}
    assert names == {"00000010", "00000010.json", "00000020", "00000020.json", "notes.txt"}
    assert same_bits(opened().restore(abstract(state_at(20)))[1], state_at(20))


def test_saving_the_restored_step_again_keeps_the_only_checkpoint(opened):
    """A run that is ended right after its restart saves the step that it restored."""
    saved(opened, 10, keep_last=1)
    again = opened(keep_last=1)
    again.restore(abstract(state_at(10)))
    stamp = (again.folder / "00000010.json").stat().st_mtime_ns
    again.save(10, state_at(10), wait=True)
    assert again.steps() == [10] and (again.folder / "00000010.json").stat().st_mtime_ns == stamp


def test_if_all_are_broken_the_folder_is_named(opened):
    checkpoints = saved(opened, 10, 20)
    for step in (10, 20):
        flip(files_of(checkpoints, step)[-1])
    with pytest.raises(UserError) as error:
        opened().restore(abstract(state_at(10)))
    assert str(checkpoints.folder) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="damaged"):
        opened().restore(abstract(state_at(10)), step=10)


def test_another_architecture_names_the_first_difference_with_both_shapes(opened):
    saved(opened, 10)
    with pytest.raises(
        UserError, match=r"trained/blocks/query is float32\[4, 8\] there and float32\[4, 9\] here"
    ):
        opened().restore(abstract(state_at(10, width=9)))
    state = state_at(10)
    fewer = state._replace(trained={"blocks": state.trained["blocks"]})
    with pytest.raises(UserError, match=r"trained/embedding is float32\[16, 8\] there and absent here"):
        opened().restore(abstract(fewer))
    more = state._replace(trained=state.trained | {"head": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"trained/head is absent there and float32\[2\] here"):
        opened().restore(abstract(more))
    with pytest.raises(UserError, match=r"step is int32\[\] there and float32\[\] here"):
        opened().restore(abstract(state._replace(step=jnp.float32(0))))


def test_a_save_that_failed_is_raised_by_the_next_call(opened):
    checkpoints = saved(opened, 10)
    (checkpoints.folder / "00000020.json").mkdir()
    checkpoints.save(20, state_at(20))
    with pytest.raises(OSError):
        checkpoints.wait()
    (checkpoints.folder / "00000020.json").rmdir()
    checkpoints.save(20, state_at(20), wait=True)
    assert same_bits(opened().restore(abstract(state_at(20)))[1], state_at(20))


DENIED = """PERMISSION_DENIED: Error writing "x": 403 Forbidden
see the console [tensorstore_spec='{}']"""


@pytest.mark.parametrize("call", ["save_async", "load"])
def test_what_a_store_refuses_is_an_error_of_the_store_and_what_is_asked_wrongly_is_not(
    opened, monkeypatch, call
):
    checkpoints, state = saved(opened, 10), {"x": np.zeros(3)}

    def asked(error):
        def refused(*given, **options):
            raise error

        monkeypatch.setattr(checkpoints_module.ocp, call, refused)
        if call == "load":
            return checkpoints.restore(abstract(state_at(10)))
        return checkpoints.save(20, state, wait=True)

    with pytest.raises(OSError) as denied:
        asked(ValueError(DENIED))
    assert denied.value.strerror == 'PERMISSION_DENIED: Error writing "x": 403 Forbidden'
    assert denied.value.filename == str(checkpoints.folder / ("00000010" if call == "load" else "00000020"))
    for error in (ValueError("INVALID_ARGUMENT: no such type"), ValueError("no"), TypeError("no")):
        with pytest.raises(type(error), match=str(error)):
            asked(error)


def test_a_save_whose_files_cannot_be_read_back_does_not_count_and_the_one_before_stays(opened, monkeypatch):
    checkpoints, digest = saved(opened, 10, keep_last=1), manifest._digest
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_digest", lambda path: None if path.suffix == ".ocdbt" else digest(path))
        with pytest.raises(OSError, match=r"what was written can't be read.*00000020/.*ocdbt"):
            checkpoints.save(20, state_at(20), wait=True)
    assert checkpoints.steps() == [10]
    assert same_bits(opened().restore(abstract(state_at(10)))[1], state_at(10))
    checkpoints.save(20, state_at(20), wait=True)
    assert checkpoints.steps() == [20]


def test_a_manifest_that_does_not_know_a_file_is_damaged(opened, said):
    """Such were written once."""
    checkpoints = saved(opened, 10, 20)
    content = manifest.read(checkpoints.folder / "00000020")
    content["files"] |= dict.fromkeys(list(content["files"])[:1])
    whole = json.dumps(content | {"checksum": manifest._checksum(content)})
    manifest.place(checkpoints.folder / "00000020").write_text(whole)
    assert opened().restore(abstract(state_at(10)))[0] == 10
    assert "00000020 (its manifest is damaged)" in said[0]


def test_each_process_reads_what_it_wrote_and_the_first_one_what_is_nobody_s(opened, monkeypatch):
    """What another has written a network's disk may not show yet."""
    checkpoints, dealt = saved(opened, 10), []
    folder = checkpoints.folder / "00000010"
    (folder / "state" / "ocdbt.process_0").rename(folder / "state" / "ocdbt.process_4")
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(manifest, "spread", lambda what, find, do: dealt.extend(find()))
    manifest.digests(folder)
    assert dealt[1] and all("process_4" in name for name in dealt[1]) and not dealt[2]
    assert "state/manifest.ocdbt" in dealt[0] and sum(map(len, dealt)) == len(files_of(checkpoints, 10))


def test_orbax_is_silent_when_all_else_logs(tmp_path):
    program = (
        "import absl.logging, jax.numpy as jnp, sys\n"
        "from llm_jax.checkpoints import Checkpoints\n"
        "absl.logging.set_verbosity(absl.logging.INFO)\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "checkpoints.save(1, {'x': jnp.ones(3)}, wait=True)\n"
        "checkpoints.close()\n"
        "absl.logging.info('ours')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(run.stderr.splitlines()) == 1 and "ours" in run.stderr


# Sessions that continue one run and are killed; forked before the backend starts, since importing costs most.
SESSIONS = """
import os, random, signal, sys, time
import numpy as np
import jax
from llm_jax.checkpoints import Checkpoints

folder, plan = sys.argv[1], sys.argv[2]

def state_at(step):
    random = [np.random.default_rng([step, i]) for i in range(6)]
    return {f"x{i}": r.standard_normal((50, 500), np.float32) for i, r in enumerate(random)}

def session(say, saves, kill_at):
    writes = 0
    def count(event, arguments):
        nonlocal writes
        if event == "open" and arguments[1] in ("w", "wb") or event in WRITES:
            writes += 1
            if writes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    checkpoints = Checkpoints(folder, keep_last=1, say=lambda line: None)
    found = checkpoints.restore({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in state_at(0).items()})
    step, state = found or (0, state_at(0))
    for name, x in state_at(step).items():
        assert np.array_equal(state[name], x), (step, name)
    say(f"sound {step}")
    sys.addaudithook(count)
    for step in range(step + 1, step + 1 + saves):
        checkpoints.save(step, state_at(step), wait=True)
        say(f"durable {step}")

def run(saves, kill_at=0, kill_after=None):
    global durable, interrupted, seconds
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        try:
            session(lambda text: os.write(theirs, (text + chr(10)).encode()), saves, kill_at)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    sound = None
    with os.fdopen(ours) as report:
        for line in report:
            word, number = line.split()
            if word == "sound":
                sound, started = int(number), time.monotonic()
                assert sound >= durable, (sound, durable)
                if kill_after is not None:
                    time.sleep(kill_after)
                    os.kill(pid, signal.SIGKILL)
            if word == "durable":
                durable, seconds = int(number), time.monotonic() - started
    assert sound is not None, "a session could not restore"
    interrupted += len(os.listdir(folder)) != 2
    return os.waitpid(pid, 0)[1] != 0

durable = interrupted = seconds = 0
run(saves=2)
if plan == "every write":
    kill_at = 1
    while run(saves=1, kill_at=kill_at):
        kill_at += 1
else:
    clock, two_saves = random.Random(0), seconds
    for _ in range(int(plan)):
        assert run(saves=10**6, kill_after=clock.uniform(0, two_saves))
assert not run(saves=1)
print(durable, interrupted)
"""


@pytest.mark.parametrize("plan", ["every write", "12"])
def test_a_killed_session_leaves_the_last_finished_save(tmp_path, plan):
    """Killed at each single change to the folder in turn, and at twelve random moments; one step is kept."""
    command = [sys.executable, "-c", SESSIONS, str(tmp_path), plan]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": hasty.flags(devices=1)}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    durable, interrupted = map(int, run.stdout.split())
    assert durable > 2 and interrupted >= 4, "too few kills hit a save"


TWO = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("fsdp"))
make = jax.jit(lambda step: {"x": jnp.arange(32.0).reshape(8, 4) + step}, out_shardings={"x": sharding})
said = []
checkpoints = Checkpoints(folder, say=said.append)
for step in (1, 2, 3):
    checkpoints.save(step, make(step))
checkpoints.close()
target = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("closed")
if rank == 0:
    (checkpoints.folder / "00000003.json").write_text("{")
again = Checkpoints(folder, say=said.append)
step, state = again.restore(target)
assert step == 2 and len(said) == (rank == 0), (step, said)
for shard in state["x"].addressable_shards:
    assert np.array_equal(shard.data, np.arange(32.0).reshape(8, 4)[shard.index] + 2)
again.save(3, make(3), wait=True)
again.close()
multihost_utils.sync_global_devices("saved")
if rank == 0:
    for step in (2, 3):
        (checkpoints.folder / f"0000000{step}.json").write_text("{")
try:
    Checkpoints(folder, say=said.append).restore(target)
except UserError as error:
    assert "no checkpoint" in str(error), error
else:
    raise SystemExit("a broken checkpoint was restored")
if rank == 0:
    (checkpoints.folder / "00000002.json").unlink()
multihost_utils.sync_global_devices("unlinked")
print("fine")
"""


def test_two_processes_save_together_and_agree_on_what_to_restore(tmp_path):
    port = np.random.default_rng(os.getpid()).integers(20_000, 60_000)
    environment = os.environ | {"XLA_FLAGS": hasty.flags(devices=2)}
    command = [sys.executable, "-c", TWO]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0 and "fine" in out, err[-3000:]
