"""Slices of TPUs, by a gcloud that is recorded; nothing here leaves this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_engines import bits, crew_of, interrupted, settings  # noqa: F401
from test_local import wait_for

from launch import gcloud, jobs, tpu
from llm_jax import claims
from llm_jax.config import UserError

SYNOPSES = Path(__file__).parent / "gcloud.json"
SLICES = tpu.Slices("runs-1", "v5litepod-8", "v2-alpha-tpuv5-lite", "us-west4-a", "mine", True, "mount it")


class Recording:
    """In place of gcloud: keeps what it is asked, and answers; nothing leaves this machine.

    What has `broken` in it fails, and what has `hangs` never ends by itself. says: by the verb of a command,
    with what errors it fails, one after another and the last for ever, as states are.
    """

    def __init__(self, *states, broken="", hangs="nothing", says=None):
        self.states, self.broken, self.hangs, self.commands = list(states), broken, hangs, []
        self.says = says or {}

    def __call__(self, command, log, in_vain):
        self.commands.append(command)
        text = " ".join(command)
        if self.hangs in text:
            wait_for(in_vain)
            return 255, "ended"
        if (errors := self.says.get(self.verbs()[-1])) and errors[0]:
            return 1, errors.pop(0) if len(errors) > 1 else errors[0]
        if self.broken and self.broken in text:
            return 1, "no such luck"
        return 0, (self.states.pop(0) if self.states[1:] else self.states[0]) if " describe " in text else ""

    def verbs(self):
        return [next(word for word in c if word in VERBS) for c in self.commands]


VERBS = {"create", "describe", "archive", "scp", "ssh", "delete"}


@pytest.fixture
def slices(tmp_path, monkeypatch):
    """The engine, with a gcloud of one's own."""
    for name in ("SECONDS_BETWEEN_LOOKS", "SECONDS_TO_LAND"):
        monkeypatch.setattr(tpu, name, 0.0)
    return lambda gcloud: tpu.Tpu(tmp_path, SLICES, gcloud)


def live(engine_):
    job = engine_.start(["train"])
    assert job.startswith("mine/us-west4-a/runs-1-")
    wait_for(lambda: not engine_.living([job]))
    engine_.stop([])
    return engine_.tail(job)


def test_a_slice_is_made_waited_for_set_up_used_and_deleted(slices, tmp_path):
    gcloud = Recording("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    live(slices(gcloud))
    waits = ["describe"] * 3
    assert gcloud.verbs() == ["create", *waits, "archive", "scp", "ssh", "ssh", "ssh", "delete"]
    assert "--spot" in gcloud.commands[0] and "--force" in gcloud.commands[-1]
    assert "--command=cd llm_jax && exec train" in gcloud.commands[-2]
    assert jobs.listed(tmp_path) == {}


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_slice_that_is_taken_back_is_deleted_so_that_another_is_asked_for(state, slices):
    gcloud = Recording("WAITING_FOR_RESOURCES", state)
    assert live(engine_ := slices(gcloud)).endswith(f": {state}")
    assert gcloud.verbs() == ["create", "describe", "describe", "delete"]
    assert engine_.lost(*engine_._threads) == (state == "SUSPENDED"), "what fails, something is wrong with"


def test_a_slice_that_breaks_is_deleted_and_says_why(slices):
    gcloud = Recording("ACTIVE", broken="exec train")
    assert live(slices(gcloud)).endswith("no such luck")
    assert gcloud.verbs()[-3:] == ["ssh", "describe", "delete"]


def test_a_slice_outlives_what_a_network_or_its_first_minute_breaks(slices):
    gone = "ERROR: unable to find the server"
    gcloud = Recording("ACTIVE", says={"describe": [gone, gone, ""], "scp": ["connection refused", gone, ""]})
    live(slices(gcloud))
    verbs = gcloud.verbs()
    assert verbs[:5] == ["create", "describe", "describe", "describe", "archive"]
    assert (verbs.count("scp"), verbs.count("ssh"), verbs.count("delete")) == (3, 3, 1)
    engine_ = slices(gcloud := Recording("ACTIVE", says={"scp": [gone]}))
    assert live(engine_).endswith(gone) and gcloud.verbs().count("scp") == tpu.SET_UPS
    assert not engine_.lost(*engine_._threads)
    engine_ = slices(gcloud := Recording("ACTIVE", says={"describe": ["NOT_FOUND: no such slice"]}))
    live(engine_)
    assert gcloud.verbs() == ["create", "describe", "delete"] and engine_.lost(*engine_._threads)


def test_a_slice_that_could_not_be_deleted_is_tried_again_and_what_is_left_is_known(
    slices, tmp_path, monkeypatch
):
    monkeypatch.setattr(tpu, "SECONDS_BETWEEN_DELETIONS", 0.0)
    away = ["connection reset"] * (2 * tpu.DELETIONS + 1)
    engine_ = slices(stub := Recording("ACTIVE", says={"delete": [*away, ""]}))
    job = engine_.start(["train"])
    wait_for(lambda: not jobs.listed(tmp_path))
    assert (stub.verbs().count("delete"), engine_.left()) == (len(away) + 1, [])
    engine_ = slices(stub := Recording("ACTIVE", says={"delete": [away[0]]}))
    engine_._launcher = "runs-1-next"  # a second has hardly passed
    job = engine_.start(["train"])
    wait_for(lambda: not engine_.living([job]))
    engine_.stop([])
    assert engine_.left() == [job] == jobs.listed(tmp_path)["tpu"]


def test_a_slice_taken_back_while_it_trains_is_noticed_though_ssh_never_ends(slices):
    gcloud = Recording("ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", hangs="exec train")
    assert live(slices(gcloud)).endswith("ended")
    assert gcloud.verbs()[-6:] == ["ssh", *["describe"] * 4, "delete"]


def test_a_stop_does_not_wait_for_ever_for_what_hangs(slices, monkeypatch):
    monkeypatch.setattr(tpu, "SECONDS_TO_STOP", 0.1)
    gcloud = Recording("ACTIVE", hangs="exec train")
    engine_ = slices(gcloud)
    job = engine_.start(["train"])
    wait_for(lambda: any("exec train" in word for command in gcloud.commands for word in command))
    engine_.stop([job])
    assert gcloud.verbs()[-1] == "delete"


def test_who_does_not_wait_for_slices_to_be_given_back_is_told_how_it_is_done(slices, monkeypatch, capsys):
    """As by a second Ctrl-C."""
    engine_ = slices(Recording("ACTIVE", hangs="exec train"))
    job = engine_.start(["train"])
    thread = engine_._threads[job]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(thread, "join", interrupted)
        engine_.stop([job])
    assert re.search(rf"not given back: {job}; .* launch.stop --folder=", capsys.readouterr().out)
    monkeypatch.setattr(tpu, "SECONDS_TO_STOP", 0.0)
    engine_.stop([job])


def test_slices_are_listed_before_they_are_asked_for_until_they_have_gone(slices, tmp_path, capsys):
    """A launcher that dies loses track of none: the next one deletes them, or `launch.stop`."""
    known = []

    class Watched(Recording):
        def __call__(self, command, log, in_vain):
            if "create" in command:
                known.append(jobs.listed(tmp_path)["tpu"])
            return super().__call__(command, log, in_vain)

    live(slices(Watched("ACTIVE", broken=" delete ")))
    (left,) = known[0]
    assert jobs.listed(tmp_path) == {"tpu": [left]}
    assert f"{left}: NOT given back" in capsys.readouterr().err
    theirs = SLICES.job("runs-1-other-0")  # of a launcher at work, and of one that has died
    dead = SLICES.job("runs-1-dead-0")
    for job in (theirs, dead):
        jobs.enlist(tmp_path, "tpu", job)
    assert claims.take(tmp_path / "launchers" / "runs-1-other")
    gcloud = Recording("ACTIVE")
    engine_ = slices(gcloud)
    engine_._launcher = "runs-1-next"  # a second has hardly passed
    live(engine_)
    assert gcloud.commands.count(tpu.deletion(dead)) == 2, "it may have been asked for just now"
    assert jobs.listed(tmp_path) == {"tpu": sorted([left, theirs])}
    assert tpu.give_back([left], gcloud) == [left]


def test_what_is_run_for_a_slice_ends_with_all_it_started(monkeypatch):
    """As gcloud's ssh does, which keeps its output open."""
    monkeypatch.setattr(tpu, "SECONDS_BETWEEN_LOOKS", 0.1)
    code, printed = tpu.really(["sh", "-c", "echo begun; sleep 600 & wait"], None, lambda: True)
    assert (code, printed) == (-signal.SIGTERM, "begun\n")


def test_commands_for_slices_are_as_gcloud_documents_them(slices):
    """Every flag of every command stands in the synopsis that gcloud prints for it, or is for all."""
    gcloud = Recording("ACTIVE")
    live(slices(gcloud))
    synopses = json.loads(SYNOPSES.read_text())
    for command in gcloud.commands:
        if command[0] == "gcloud":
            asked = {word.partition("=")[0] for word in command if word.startswith("--")}
            assert asked <= {*synopses[" ".join(command[1:5])], "--format", "--quiet", "--project"}


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud isn't installed")
def test_the_synopses_kept_are_gcloud_s_own():
    """Those of 528.0.0; UPDATE_GOLDEN=1 writes them anew."""
    said = {}
    for command in json.loads(SYNOPSES.read_text()):
        words = ["gcloud", *command.split(), "--help"]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", text)
        said[command] = sorted(
            set(re.findall("--[a-z-]+", text.partition("SYNOPSIS")[2].partition("\nDESCRIPTION")[0]))
        )
    if os.environ.get("UPDATE_GOLDEN"):
        SYNOPSES.write_text(json.dumps(said, indent=1) + "\n")
    assert json.loads(SYNOPSES.read_text()) == said


# ---- what gcloud refuses ----

CREATE = "ERROR: (gcloud.compute.tpus.queued-resources.create) "
NO_PROJECT = f"""{CREATE}Error parsing [queued_resource].
The [queued_resource] resource is not properly specified.
Failed to find attribute [project]. The attribute can be set in the following ways:
- provide the argument `--project` on the command line
- set the property `core/project`
"""
NO_ROOM = f"{CREATE}RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' exceeded. Limit: 8 in us-west4.\n"


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        (NO_PROJECT, "Failed to find attribute [project]: name one by --project"),
        (f"{CREATE}You do not currently have an active account selected.\nPlease run:", "You do not"),
        (
            f"{CREATE}PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied",
            "PERMISSION_DENIED: P",
        ),
        (f"{CREATE}NOT_FOUND: no type v5p-512 in zone us-west4-x", "NOT_FOUND: no type"),
        ("ERROR: gcloud crashed (AttributeError): 'str' has no 'x'\n\nPlease report it", "gcloud crashed"),
        ("Traceback (most recent call last):\n  File x\nImportError: no module named six", "ImportError: no"),
    ],
)
def test_what_lasts_ends_the_launch_with_gcloud_s_own_line_and_leaves_nothing_listed(
    printed,
    error,
    slices,
    bits,  # noqa: F811
    tmp_path,
    capsys,
):
    """gcloud can't look for the slice either, for the same reason."""
    stub = Recording(says={"create": [printed], "describe": [printed], "delete": [printed]})
    runs, crew = crew_of(slices(stub), tmp_path, bits)
    with pytest.raises(UserError) as refused:
        crew.train(runs, 2, lambda: None)
    assert str(refused.value).startswith(f"gcloud: {error}") and "\n" not in str(refused.value)
    assert (stub.verbs(), jobs.listed(tmp_path)) == (["create", "describe"], {})
    assert "NOT given back" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "printed",
    [
        NO_ROOM,
        f"{CREATE}UNAVAILABLE: try again",
        f"{CREATE}There is no more capacity in",
        "timed out",
    ],
)
def test_what_may_pass_is_asked_for_again_and_told(printed, slices, tmp_path):
    told = []

    class Watched(Recording):
        def __call__(self, *given):
            told.append(engine_.waits())
            return super().__call__(*given)

    stub = Watched("ACTIVE", says={"create": [printed, printed, ""]})
    engine_ = slices(stub)
    live(engine_)
    assert stub.verbs()[:4] == ["create", "create", "create", "describe"] and stub.verbs()[-1] == "delete"
    assert told[:4] == ["", *[f"gcloud: {gcloud.error(printed)}"] * 2, ""]
    stub.says = {"create": [NO_PROJECT, ""]}
    stub.states.append("ACTIVE")
    live(engine_)
    assert stub.verbs().count("create") == 5, "what was granted once isn't refused for ever"


def test_a_slice_that_gcloud_knows_though_it_refused_it_is_deleted(slices, tmp_path, capsys):
    crashed = "ERROR: gcloud crashed (KeyError): 'name'\nmore"
    live(slices(stub := Recording("ACCEPTED", says={"create": [crashed], "delete": [crashed]})))
    assert stub.verbs() == ["create", "describe", *["delete"] * 2 * tpu.DELETIONS]
    (left,) = jobs.listed(tmp_path)["tpu"]
    told = "NOT given back, and costs money: gcloud crashed (KeyError): 'name'"
    assert capsys.readouterr().err == f"{left}: {told}\n" * 2


def test_gcloud_gets_none_of_this_python_s_own_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/here")
    assert tpu.really(["sh", "-c", "echo ${PYTHONPATH-none}"], None, tpu.never) == (0, "none\n")


def test_types_of_slices_are_known_or_refused_with_the_nearest():
    """Images by Google's page of runtimes."""
    runtimes = {"v5litepod-8": "v2-alpha-tpuv5-lite", "v5p-8": "v2-alpha-tpuv5", "v6e-8": "v2-alpha-tpuv6e"}
    runtimes |= dict.fromkeys(("v2-8", "v3-2048", "v4-1536"), "tpu-ubuntu2204-base")
    assert {kind: gcloud.family_of(kind).runtime for kind in runtimes} == runtimes
    known = {"v9-8": "did you mean 'v4-8'", "v5e-16": "did you mean 'v5litepod-16'"}
    known |= {"v5litepod-7": "of v5litepod there are 1, 4, 8, 16,", "v5p-12": "and others that 128 divides"}
    for wrong, told in known.items():
        with pytest.raises(UserError, match=f"--accelerator={wrong}: .*{told}"):
            gcloud.family_of(wrong)


def test_any_folder_gives_a_name_that_google_cloud_and_kubernetes_take():
    names = {"isoflop-cpu": "isoflop-cpu", "Runs_1": "runs-1", "2026 runs": "runs-2026-runs", "_": "runs"}
    assert {folder: gcloud.name_of(Path("/mnt") / folder) for folder in names} == names
    long = {gcloud.name_of(Path(f"{'lr_transfer-' * 9}{seed}")) for seed in range(3)}
    assert len(long) == 3 and all(re.fullmatch("[a-z][a-z0-9-]{,38}[a-z0-9]", name) for name in long)


def test_a_folder_that_no_slice_sees_is_refused_and_help_tells_of_all_flags(tmp_path):
    command = [sys.executable, "-m", "launch.tpu", "--config=experiments/isoflop.py:smoke", "--zone=z"]
    command += [f"--folder={tmp_path}/runs", "--accelerator=v6e-8", "--dry_run"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "is on this machine's disk, which slices don't see" in refused.stderr
    told = subprocess.run([*command, "--mount=mount it"], capture_output=True, text=True).stdout
    assert "--runtime-version=v2-alpha-tpuv6e" in told and "until it says ACTIVE" in told
    told = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    assert {"config", "folder", "workers", "zone"} <= set(re.findall(r"--(?:\[no\])?(\w+)", told))
