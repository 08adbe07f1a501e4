"""Several hosts as one place: here all on this machine, each with one device, joined by gloo."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
import uuid
from pathlib import Path

import hasty
import jsonschema
import pytest
from absl import flags
from test_clusters import LONG_SECONDS, SWEEP, training
from test_local import launched, wait_for, where_workers_find_things  # noqa: F401

from launch import engine, gcloud, hosts, jobset, slurm, tpu
from launch.processes import Share
from llm_jax import config, distributed, experiment_file, files, records
from llm_jax.config import UserError
from llm_jax.distributed import Place, variables
from llm_jax.train import train
from llm_jax.values import AGAIN


@pytest.fixture(autouse=True)
def one_device_each(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", hasty.flags(devices=1))


def of_place(pid, number):
    """Whether a process is number so and so of a place."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"LLM_JAX_PROCESS={number}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def workers():
    found = subprocess.run(["pgrep", "-f", "launch.worker --experiment"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_two_hosts_train_a_sweep_as_one_does_though_the_worker_of_one_is_killed(tmp_path):
    mine, folder = tmp_path / "mine.py", tmp_path / "sweep"
    mine.symlink_to(SWEEP)
    (tmp_path / "bits.py").symlink_to(SWEEP.parent / "bits.py")
    together = ["-m", "launch.together", "--processes=2", "--", "-m", "launch.local"]
    place = subprocess.Popen(
        [sys.executable, *together, f"--config={mine}:pair", f"--folder={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: training(folder), place)
    (second,) = [pid for pid in workers() if of_place(pid, 1) and str(mine) in command_of(pid)]
    os.kill(second, signal.SIGKILL)
    said, _ = place.communicate(timeout=LONG_SECONDS)
    assert place.returncode == 0, said
    assert re.search(r"host 1: its worker was killed by SIGKILL .*; try 2 of 3 continues it", said)
    assert "the 2 hosts of this place train each run together" in said
    assert said.count("2/2 runs done") == 1  # host 0 alone speaks
    assert not [pid for pid in workers() if str(mine) in command_of(pid)]
    module, _ = experiment_file.load_experiment(str(SWEEP))
    runs = module.sweep(module.get_config("pair"))
    found = [records.load_run(folder / run.identity())["result"] for run in runs]
    for run, result in zip(runs, found, strict=True):
        alone = train(config.replace(run, "data.seconds", 0.0), tmp_path / "alone" / run.identity())
        assert result["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)
    assert sorted(len(records.starts(folder / run.identity())) for run in runs) == [1, 2]


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def two_of(monkeypatch, number):
    for name, value in variables(Place(distributed.address(), 2, number)).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("number", [0, 1])
def test_hosts_refuse_alike_and_plan_once(number, command, monkeypatch, tmp_path):
    two_of(monkeypatch, number)
    where = f"--config={SWEEP}:pair", f"--folder={tmp_path}"
    code, _, error = command("launch.local", *where, "--workers=2")
    assert (code, error) == (2, "error: --workers=2: 2 hosts train one run at a time together\n")
    code, _, error = command("launch.local", "--config=experiments/counting.py:smoke", "--coordinator=h")
    assert code == 2 and "--coordinator=h --processes=2" in error
    code, _, error = command("launch.local", "--config=experiments/packing.py:smoke")
    assert code == 2 and error.endswith("packing.py measures, on one host; here are 2\n")
    code, out, _ = command("launch.local", *where, "--dry_run")
    assert code in (0, None) and ("packs: none (the 2 hosts" in out) == (number == 0)
    assert not list(tmp_path.iterdir())


def test_a_host_whose_first_never_comes_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "SECONDS_TO_COME", 0.1)
    place = Place(distributed.address(), 2, 1)
    assert hosts.follow(place, SWEEP) == 1
    assert capsys.readouterr().err == f"host 1 of 2: nobody at {place.coordinator}, which is host 0's\n"


def here(processes=2):
    """A place on this machine, as its first host sees it."""
    return Place(f"127.0.0.1:{distributed.address().rpartition(':')[2]}", processes, 0)


def come(place, others, number=1):
    """A link of another host, which its first one knows."""
    link = hosts._connected(place)
    link.say(host=number)
    wait_for(lambda: number in others._links)
    return link


@pytest.fixture
def told():
    """A process of its own that may be interrupted: its handlers are as before, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signals(monkeypatch):
    """What a follower does at a signal; only the main thread of a process has any."""
    handlers = {}
    monkeypatch.setattr(hosts.signal, "signal", handlers.__setitem__)
    return handlers


class Following:
    """A follower in a thread; its first host says and hears by `link`."""

    def __init__(self, place=Place("", 2, 1)):
        self.codes = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            there = place._replace(coordinator=f"127.0.0.1:{server.getsockname()[1]}")
            self._thread = threading.Thread(target=lambda: self.codes.append(hosts.follow(there, SWEEP)))
            self._thread.start()
            connected = server.accept()[0]
        assert hosts._knows(connected, b"", "host 0", "another host")
        self.link = hosts.Link(connected, "host 1")

    def ended(self):
        self._thread.join()
        return self.codes


def test_a_host_whose_first_goes_comes_again(signals, capsys):
    following = Following()
    following.link.socket.close()
    assert following.ended() == [AGAIN]
    assert capsys.readouterr().err == "host 1 of 2: host 0 has gone, and with it this place\n"


def test_the_first_host_ends_where_another_never_comes_or_goes(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "SECONDS_TO_COME", 5.0)
    place = here(3)
    with pytest.raises(SystemExit) as end, hosts.leading(place) as others:
        links = [come(place, others, number) for number in (1, 2)]
        first = others.begin()
        assert [list(link.messages()) for link in links] == [[{"start": first["LLM_JAX_COORDINATOR"]}]] * 2
        links[1].say(died="its worker broke", of="an earlier place")
        links[1].say(died="its worker broke", of=first["LLM_JAX_COORDINATOR"])
        assert others.death(LONG_SECONDS) == "host 2: its worker broke"
        others.check()
        links[0].socket.close()
        wait_for(lambda: others._over)
        others.check()
    assert end.value.code == AGAIN
    assert "this place of 3 hosts ends: host 1 has gone" in capsys.readouterr().err
    assert list(links[1].messages()) == [{"end": AGAIN}]
    monkeypatch.setattr(hosts, "SECONDS_TO_COME", 0.1)
    place = here(3)
    with pytest.raises(SystemExit) as end, hosts.leading(place) as others:
        link = come(place, others)
        others.begin()
    assert end.value.code == 1, "a failure, or whoever starts places would start it for ever"
    assert list(link.messages()) == [{"end": 1}]
    assert capsys.readouterr().err.endswith("without host 2\n")


def test_a_host_that_comes_when_all_is_done_is_told_so(signals):
    """Else it would wait for its first, and be started again, for ever."""
    place, found = here(), []
    late = threading.Timer(0.5, lambda: found.append(hosts.follow(place._replace(process=1), SWEEP)))
    late.start()
    with hosts.leading(place) as others:
        assert others.end(0) == 0
    late.join()
    assert found == [0]


def test_nobody_but_a_host_of_the_place_is_obeyed():
    place = here()
    with hosts.leading(place) as others:
        strangers = [hosts._connected(place) for _ in range(3)]
        strangers[0].say(asked=True)
        strangers[1].socket.sendall(b"GET / HTTP/1.1\n")
        strangers[2].say(host=2)
        host = come(place, others)
        host.say(asked=signal.SIGKILL)
        host.say(asked=True)
        wait_for(lambda: others._asked)
        assert others._asked is True and set(others._links) == {1}


def test_who_does_not_know_the_secret_is_neither_obeyed_nor_told_it(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "SECONDS_TO_COME", 0.1)
    monkeypatch.setenv(distributed.SECRET, "of this place")
    place = here()
    with hosts.leading(place) as others:
        known = hosts._connected(place)
        monkeypatch.setenv(distributed.SECRET, "of another place")
        assert hosts.follow(place._replace(process=1), SWEEP) == 1
        why = f"somebody without this place's {distributed.SECRET} at {place.coordinator}, which is host 0's"
        assert capsys.readouterr().err == f"host 1 of 2: {why}\n"
        monkeypatch.setenv(distributed.SECRET, "of this place")
        known.say(host=1)
        wait_for(lambda: others._links)
        address = known.socket.getpeername()
        with socket.create_connection(address, timeout=5.0) as echo:  # what it sends isn't the answer
            echo.sendall(echo.recv(32))
            echo.sendall(echo.recv(32))
            assert echo.recv(1) == b""


def test_a_follower_sets_no_variables_that_it_is_told(signals, monkeypatch):
    started = []
    monkeypatch.setattr(hosts, "Worker", lambda _, share: started.append(dict(share.environment)) or 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    following = Following()
    following.link.say(start={"LD_PRELOAD": "/tmp/mine.so"} | variables(Place("h:1", 2, 1)))
    following.link.say(start="h:1")
    following.ended()
    assert started == [variables(Place("h:1", 2, 1)) | {distributed.LAUNCHER: ""}]


def test_a_launch_that_is_stopped_waits_for_no_host():
    with pytest.raises(KeyboardInterrupt), hosts.leading(here(), lambda: True) as others:
        others.begin()


def test_what_the_worker_of_another_host_printed_is_in_the_bucket_where_it_is_killed(
    bucket, tmp_path, monkeypatch
):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nread task\necho about to die\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    place, folder = Place("h:1", 2, 1), files.path(bucket, uuid.uuid4().hex)
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = hosts.Link(socket.create_connection(server.getsockname()), "host 0")
        leader = hosts.Link(server.accept()[0], "host 1")
    hand, ended = hosts.Hand(link, place, SWEEP, [math.inf]), []
    thread = threading.Thread(target=lambda: ended.append(hand.work()))
    thread.start()
    leader.say(start="h:1")
    leader.say(task={"runs": [{"folder": str(folder)}]})
    cause = "its worker was killed by SIGKILL (out of memory?) (about to die)"
    assert list(leader.messages()) == [{"died": cause, "of": "h:1"}]
    leader.say(end=3)
    thread.join()
    assert ended == [3] and (folder / "log.1.txt").read_text() == "about to die"


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of host 0"):
            hosts.Followers(Place(f"h:{port}", 2, 0))


def launched_by(place, others, launch):
    """The code of a launch on the first host, of whose workers some train when `launch` is called."""
    return engine.stoppable("local", lambda: launch(come(place, others)))


def test_a_host_that_is_told_to_end_has_the_first_told(told):
    """As where a node is given back: all save, and none is left behind."""
    place = here()

    def launch(link):
        link.say(asked=True)
        wait_for(lambda: others._asked)
        others.check()

    with hosts.leading(place) as others:
        assert others.end(launched_by(place, others, launch)) == 143


def test_ctrl_c_on_all_hosts_at_once_cuts_no_save_short(told):
    """As srun hands it on: the first host has its own, and what the others say of theirs is no second one."""
    place, saved = here(), []

    def launch(link):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:  # as the pool, which kills its workers at a second one
            link.say(asked=True)
            wait_for(lambda: others._asked)
            saved.append(True)

    with hosts.leading(place) as others:
        assert launched_by(place, others, launch) == 130
    assert saved


def test_a_follower_says_once_that_it_was_told_to_end(signals):
    following = Following()
    assert list(following.link.messages()) == [{"host": 1}]
    wait_for(lambda: {signal.SIGINT, signal.SIGTERM} <= signals.keys())
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        signals[number](number, None)
    assert list(following.link.messages()) == [{"asked": True}]
    following.link.say(end=130)
    assert following.ended() == [130]
    following.link.socket.setblocking(False)
    assert not list(following.link.messages())


def test_a_task_of_a_node_keeps_to_its_devices(monkeypatch):
    monkeypatch.setattr(hosts, "gpus", lambda: ["4", "6"])
    assert hosts.share(Place("h:1", 4, 1, [1])) == Share(environment=(("CUDA_VISIBLE_DEVICES", "6"),))
    assert hosts.share(Place("h:1", 4, 1)) == Share()
    with pytest.raises(UserError, match=r"no GPU for task 2 .* its 2, so --ntasks-per-node=2"):
        hosts.share(Place("h:1", 4, 2, [2]))
    monkeypatch.setattr(hosts, "gpus", lambda: [])
    assert hosts.share(Place("h:1", 4, 3, [3])) == Share(), "on CPUs a node may have several tasks"


def test_a_place_in_which_a_task_has_no_gpu_is_refused_by_all_of_it(signals, monkeypatch, capsys):
    """Else its first host would take the others for lost, and ask to be started again."""
    monkeypatch.setattr(hosts, "gpus", lambda: ["0"])
    place, refused = here(), []

    def follow():
        with pytest.raises(UserError) as error:
            hosts.follow(place._replace(process=1, devices=[1]), SWEEP)
        refused.append(str(error.value))

    thread = threading.Thread(target=follow)
    thread.start()
    with pytest.raises(SystemExit) as end, hosts.leading(place) as others:
        wait_for(lambda: others._over)
        others.begin()
    thread.join()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"this place of 2 hosts ends: host 1: {refused[0]}\n"


# ---- as engines ask for them ----


def test_a_job_of_several_nodes_is_started_and_asked_by_slurm_on_all_of_them(tmp_path):
    many = slurm.Slurm(tmp_path, ["--partition=gpu"], hosts=4)
    assert {"--nodes=4", "--ntasks-per-node=1"} <= set(many.line(2))
    script = many.script(["train", "it"])
    assert re.search(r"^srun .*--ntasks-per-node=1 .*train it &$", script, re.M)
    assert 'scancel --signal=TERM "$task"' in script and "kill -TERM" not in script
    assert re.search(rf"^export {distributed.SECRET}=\$\(.*urandom", script, re.M)
    alone = slurm.Slurm(tmp_path)
    assert "\nsrun" not in alone.script(["train"]) and not any("--nodes" in word for word in alone.line(2))


@pytest.mark.parametrize(
    ("ends", "restarts", "again"),
    [
        *((AGAIN, 0, True), (AGAIN, slurm.RESTARTS - 1, True), (AGAIN, slurm.RESTARTS, False)),
        *((1, 0, False), (2, 0, False), (0, 0, False), (143, 0, False), (137, slurm.TRIES - 1, True)),
    ],
)
def test_a_job_that_loses_a_node_each_time_is_not_queued_for_ever(ends, restarts, again, tmp_path):
    known = {"SLURM_RESTART_COUNT": str(restarts)}
    assert ended(tmp_path, f"exit {ends}", known) == (ends, again)


@pytest.mark.parametrize("code", [143, AGAIN])
def test_a_job_out_of_time_is_queued_again_however_often(code, tmp_path):
    saves = f"trap 'exit {code}' TERM; kill -USR1 $PPID; while :; do sleep 0.1; done"
    known = {"SLURM_RESTART_COUNT": str(10 * slurm.RESTARTS)}
    assert ended(tmp_path, saves, known) == (code, True)
    (tmp_path / engine.STOP).touch()
    assert ended(tmp_path, saves, known) == (code, False)


def test_what_a_preemption_s_grace_ends_on_several_nodes_is_queued_again(tmp_path):
    """Slurm tells the tasks of a step, not the script of its job."""
    known = {"SLURM_RESTART_COUNT": str(10 * slurm.RESTARTS)}
    assert ended(tmp_path, "exit 143", known, hosts=2) == (143, True)
    cancelled = "trap 'exit 143' TERM; kill -TERM $PPID; sleep 0.5; kill -TERM $$"
    assert ended(tmp_path, cancelled, known, hosts=2) == (143, False)


def ended(folder, command, known, hosts=1):
    """How a job's script ends where its command is this one, and whether it is queued again."""
    stubs = {"scontrol": f"echo $* > {folder}/asked", "srun": f'shift {len(slurm.SRUN) - 1}; exec "$@"'}
    for name, does in stubs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    (folder / "asked").unlink(missing_ok=True)
    place = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2", "PATH": f"{folder}:/usr/bin:/bin"}
    script = slurm.Slurm(folder, hosts=hosts).script(["sh", "-c", command])
    job = subprocess.run(["bash", "-c", script], env=place | known, check=False)
    return job.returncode, (folder / "asked").exists()


def test_a_place_of_several_hosts_trains_one_run_at_a_time(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(each=2))
    engine.refuse_each(1)
    with pytest.raises(UserError, match="--each=2: the 4 hosts of a worker train one run together"):
        engine.refuse_each(4)


def test_hosts_of_a_slice_follow_from_the_name_of_its_type():
    """As Google's pages have them: v5e and v6e are named by chips, the others by cores."""
    hosts = {"v5litepod-8": 1, "v5litepod-16": 4, "v5litepod-256": 64, "v6e-8": 1, "v6e-32": 8}
    hosts |= {"v4-8": 1, "v4-32": 4, "v5p-8": 1, "v5p-128": 16, "v3-32": 4}
    assert {kind: tpu.Slices("runs", kind, "", "", "", False, "").hosts for kind in hosts} == hosts
    with pytest.raises(UserError, match="a type and a size, such as v5litepod-8"):
        gcloud.hosts_of("--accelerator=v4", "v4")


def test_a_slice_is_set_up_and_used_on_all_its_hosts():
    many = tpu.Slices("runs", "v4-32", "", "", "", False, "mount it")
    there = [line for line in (*many.set_up("x"), many.use("x", ["train"])) if line[0] == "gcloud"]
    assert len(there) == 4 and all("--worker=all" in line for line in there)


V5E = "tpu-v5-lite-podslice"


def test_the_manifest_asks_for_a_slice_and_makes_dead_pods_again():
    made = jobset.manifest("sweep-0", ["python"], "image", "disk", "/runs", V5E, "2x4")
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["completions"]) == (1, 1)
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
    assert job["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy is refused with any other"
    assert job["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    made = jobset.manifest("sweep-0", ["python"], "image", None, "gs://bucket", V5E, "2x4")
    assert "gs://bucket" not in json.dumps(made) and "volume" not in json.dumps(made)


def test_the_manifest_has_a_pod_for_each_host_of_each_slice_that_trains_together():
    made = jobset.manifest("sweep-0", ["python"], "image", "disk", "/runs", V5E, "4x8", slices=2)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 8, 8)
    assert (job["completionMode"], made["spec"]["network"]["enableDNSHostnames"]) == ("Indexed", True)
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert jobset.POOL in made["metadata"]["annotations"].values(), "all pods of a job on one slice"
    limits = job["backoffLimitPerIndex"], job["maxFailedIndexes"], job.get("backoffLimit")
    assert limits == (jobset.RESTARTS, 0, None), "of each host, and the first that has too many ends all"


def action(job, code, *conditions):
    """What Kubernetes does with a pod that ended so, by the first rule that matches; else it counts it."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": ()})
        assert codes["operator"] == "In" and len(rule) == 2
        named = [(condition["type"], condition["status"]) for condition in rule.get("onPodConditions", ())]
        if code in codes["values"] or set(named) & set(conditions):
            return rule["action"]
    return "Count"


def test_pods_that_cannot_work_are_not_made_again_and_those_that_lost_others_are():
    made = jobset.manifest("sweep-0", ["python"], "image", "disk", "/runs", V5E, "4x8")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert [action(job, code) for code in (2, 1, 137)] == ["FailJob", "Count", "Count"]
    assert [action(job, code) for code in (AGAIN, 143)] == ["Ignore", "Ignore"]
    assert action(job, 2, ("DisruptionTarget", "True")) == "Ignore", "its node took the disk with it"
    assert made["spec"]["failurePolicy"] == {"maxRestarts": 0}, "or the failed job would be made again whole"


@pytest.mark.parametrize("wrong", ["--image=my image", "--claim=My_Runs"])
def test_names_that_kubernetes_would_refuse_are_refused_in_a_line(command, tmp_path, wrong):
    named = ["--image=europe-docker.pkg.dev/lab/llm/jax:1", "--claim=runs", f"--folder={tmp_path}/sweep"]
    code, told, line = command("launch.jobset", f"--config={SWEEP}:pair", *named, wrong)
    assert (code, told, line.count("\n")) == (2, "", 1) and re.match(f"error: {wrong[:7]}.* is no ", line)
    code, told, line = command("launch.jobset", f"--config={SWEEP}:pair", *named)
    assert code in (0, None) and json.loads(told)["items"][0]["metadata"]["name"] == "sweep-0"


@pytest.mark.parametrize("topology", ["2x4", "16x16"])
def test_the_manifest_has_fields_that_the_definition_of_jobsets_has_and_no_others(topology):
    schema = json.loads((Path(__file__).parent / "jobset.json").read_text())
    made = jobset.manifest("sweep-0", ["python"], "image", "disk", "/runs", V5E, topology)
    jsonschema.validate(made, schema)
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'backofLimit' was unexpected"):
        jsonschema.validate(made, schema)


@pytest.mark.parametrize(
    ("kind", "topology", "chips", "hosts"),
    [
        (V5E, "2x4", None, (1, 8)),
        (V5E, "2x4", 4, (2, 4)),
        (V5E, "16x16", None, (64, 4)),
        ("tpu-v4-podslice", "2x2x1", None, (1, 4)),
        ("tpu-v4-podslice", "2x2x2", None, (2, 4)),
        ("tpu-v5p-slice", "4x4x12", None, (48, 4)),
    ],
)
def test_hosts_of_a_topology(kind, topology, chips, hosts):
    assert jobset.hosts_of(kind, topology, chips) == hosts


@pytest.mark.parametrize(
    ("kind", "topology", "chips"),
    [
        *((V5E, "3x5", None), (V5E, "4x4", 16), (V5E, "4x4x4", None), (V5E, "eight", 8)),
        *(("tpu-v4-podslice", "2x2x2", 8), ("tpu-v5p-slice", "4x4", None), ("tpu-v5p-slice", "4x4x0", None)),
    ],
)
def test_what_no_slice_is_gets_no_manifest(kind, topology, chips):
    with pytest.raises(UserError, match=f"--topology={topology}"):
        jobset.hosts_of(kind, topology, chips)
    with pytest.raises(UserError, match="--accelerator=tpu-v99: GKE has no such TPUs"):
        jobset.hosts_of("tpu-v99", topology, chips)
