"""What a user can get wrong on a command line: exit code 2 and one line that says what would be right."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from llm_jax import buckets, config, experiment_file
from llm_jax.config import UserError
from llm_jax.records import load_run
from llm_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent
ISOFLOP = f"--config={ROOT / 'experiments' / 'isoflop.py'}:smoke"

ONE_DEVICE = "--config.execution.mesh.data=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with corpora that are wrong in one way each, and an empty cache."""
    folder = tmp_path_factory.mktemp("bad")
    corpora = {
        "empty": b"",
        "blank": b" \n\t\n",
        "line": b"one line is one document\n",
        "short": b"".join(b"line %d\n" % number for number in range(60)),
        "latin1": "caf\u00e9 ".encode("latin-1") * 500,
        "text": b"".join(b"a line of text, number %d\n" % number for number in range(2000)),
    }
    for name, content in corpora.items():
        (folder / f"{name}.txt").write_bytes(content)
    (folder / "odd").mkdir()
    (folder / "odd" / "hollow.model").write_bytes(b"")
    (folder / "odd" / "hollow.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "c"}})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def files(folder):
    """All files below, with their contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(code, out, err):
    """The one line of a refused command; bars that were drawn before it are wiped away."""
    line = err.rpartition("\r")[2]
    assert (code, out, line.count("\n")) == (2, "", 1), err
    assert line.startswith("error: ")
    return line


def experiment():
    return experiment_file.load_experiment(ISOFLOP.removeprefix("--config="))[0]


def missing_fields(message, arguments):
    """What `message` says as if it were a field, and what can't be typed behind --config so."""
    base = experiment().get_config("smoke")
    for flag in arguments:
        path, _, value = flag.removeprefix("--config.").partition("=")
        with contextlib.suppress(UserError):
            base = config.override(base, path, value)
    fields = {flag.partition("=")[0].removeprefix("--config.") for flag, _ in config.listing(base)}
    fields |= {field.rpartition(".")[0] for field in fields}
    rooms = {part for field in fields for part in field.split(".")[:-1]}
    named = re.findall(
        rf"(?<![\w/=.])(?:--)?(?:config\.)?((?:{'|'.join(rooms)})\.[a-z]\w*(?:\.\w+)*)", message
    )
    return {name.removeprefix("--").removeprefix("config.") for name in named} - fields


BAD = [
    (["--config.data.corpus=txt/*.txt"], "no corpus at 'txt/*.txt'; "),
    (["--config.data.corpus=textt.txt"], "did you mean 'text.txt'?"),
    (["--config.data.corpus=empty.txt"], "is empty: there is nothing to learn from; name files with text"),
    (["--config.data.corpus=blank.txt"], "has nothing but white space: there is nothing to learn from"),
    (["--config.data.corpus=line.txt"], "one document of 25 bytes, so none can be held out"),
    (["--config.data.corpus=short.txt"], "tokens to train on, and a batch takes 4 rows of 128, 512"),
    (
        ["--config.data.corpus=latin1.txt"],
        "latin1.txt: byte 3 is not UTF-8; --config.data.corpus.errors=replace",
    ),
    (["--config.model.heads=5"], "model.heads=5 does not divide model.width=64; 4 does"),
    (
        ["--config.data.batch_size=3", "--config.execution.mesh.data=2"],
        "a batch of 3 rows (data.batch_size) doesn't divide over 2 devices",
    ),
    (["--config.execution.mesh.data=9"], "execution.mesh data=9 needs 9 devices, and there are"),
    (
        [
            "--config.data.corpus=text.txt",
            "--config.data.tokenizer=sentencepiece",
            "--config.data.tokenizer.vocabulary=9999",
        ],
        "data.tokenizer.vocabulary=9999 is larger than the corpus supports: at most",
    ),
    (["--config.data.tokenizer=sentencepiece", "--config.data.tokenizer.vocabulary=9"], "260 .. 1048576"),
    (["--config.data.tokenizer=none.model"], "no tokenizer file 'none.model'"),
    (["--config.model.positions.theta=0"], "model.positions.theta=0.0 must be positive"),
    (["--config.optimizer.schedule.warmup_fraction=2"], "optimizer.schedule.warmup_fraction is 2.0"),
    (["--config.data.corpus=markov", "--config.data.corpus.states=1"], "data.corpus.states is 1"),
    (["--config.model=pretrained"], "model.path is empty; name a model: --config.model=runs/base"),
    (["--config.model=lora", "--config.model.rank=0"], "model.rank is 0; it is at least 1"),
    (["--config.model=lora", "--config.model.matrices=querry,"], "no matrix 'querry'; did you mean 'query'?"),
    (["--config.data.tokenizer=pretrained"], "data.tokenizer.path is empty; name a model"),
    (["--config.execution.checkpoint.keep_best=loss"], "keep_best=loss compares evaluations: say how often"),
    (["--config.execution.checkpoint.keep_last=0"], "execution.checkpoint.keep_last is 0; it is at least 1"),
    (
        ["--config.execution.evaluate_every_steps=-1"],
        "execution.evaluate_every_steps is -1; it is at least 0",
    ),
    (
        ["--config.sweep.tokens_per_parameter=-1"],
        "sweep.tokens_per_parameter is -1.0; it is a positive number",
    ),
    (["--config.sweep.bootstrap=9"], "sweep.bootstrap is 9; it is at least 100"),
    (["--config.sweep.shapes=()"], "sweep.shapes is (); it needs 1 (width, layers) or more"),
    (["--config.sweep.shapes=((8,1),(-4,1))"], "sweep.shapes has (-4, 1); width and layers are at least 1"),
    (
        ["--config.sweep.shapes=((4,1,2),)"],
        "config.sweep.shapes: '(4,1,2)' is not a tuple (an integer, an integer)",
    ),
    (["--config.sweep.budgets_flops=1e9,"], "sweep.budgets_flops is (1000000000.0,); three budgets at least"),
    (["--config.sweep.budgets_flops=()"], "sweep.budgets_flops is (); three budgets at least"),
    (["--config.data.unique_tokens=-10"], "data.unique_tokens is -10; it is at least 1"),
    (
        ["--config.data.corpus=text.txt", "--config.data.sequence_length=1000000000"],
        "tokens to train on, and a batch takes 4 rows of 1000000000",
    ),
    (
        ["--config.data.corpus=mixture"],
        "data.corpus.parts is (); an experiment file names the parts of a mixture",
    ),
    (["--config.data.tokenizer=text.model"], "no tokenizer file 'text.model'; give its path"),
    (
        ["--config.data.tokenizer.vocabulary=600", "--config.data.tokenizer=sentencepiece"],
        "(--config.data.tokenizer=sentencepiece comes first, then its fields)",
    ),
    (
        ["--config.data.corpus=markov", "--config.data.corpus.sharpness=0"],
        "data.corpus.sharpness is 0.0; it is a positive number",
    ),
    (["--config.data.corpus=line.txt/a.txt"], "no corpus at 'line.txt/a.txt'"),
    (["--config.data.tokenizer=odd/hollow.model"], "hollow.model: not a SentencePiece model"),
    (["--config.data.tokenizer=odd/hollow.json"], "hollow.json can't be used as a tokenizer"),
    (["--config.data.tokenizer=~nobody/a.json"], "no tokenizer file '~nobody/a.json'"),
    (["--config.data.tokenizer=" + "a" * 300 + ".json"], "aaa.json: File name too long"),
    (["--config.model.kind=mamab"], "no model 'mamab'; there are: transformer"),
    (["--config.seed=-1"], "seed is -1; it lies in 0 .. 4294967295"),
    (
        ["--config.tokens=1000000000000000"],
        "tokens is 1e+15, 1.95312e+12 steps of 512; a run has at most 100,000,000",
    ),
    (["--config.execution.checkpoint.keep_steps=-3,"], "keep_steps has -3; steps count from 1"),
    (
        ["--config.optimizer.weight_decay=0.2", "--config.optimizer=lion"],
        "--config.optimizer=lion comes before --config.optimizer.weight_decay",
    ),
    (
        ["--config.data.corpus=markov", "--config.data.corpus.mean_length=1000000000"],
        "data.corpus.mean_length is 1000000000; it is at most 2**20",
    ),
    (["--config.data.corpus.pakages=true"], "no field 'pakages' in Python; did you mean 'packages'?"),
    (["--config.model.layers=two"], "config.model.layers: 'two' is not an integer"),
    (["--conf.tokens=5"], "no flag --conf.tokens; did you mean '--config.tokens'?"),
    (["--config.seed", "--config.tokens=5"], "--config.seed needs a value: --config.seed=VALUE"),
    (
        ["--config.data.corpus=files"],
        "data.corpus.paths is (); name texts, for example --config.data.corpus=",
    ),
    (
        ["--config.model.parametrization=mup", "--config.model.parametrization.base_width=0"],
        "model.parametrization.base_width is 0; it is at least 1",
    ),
    (
        ["--config.model.parametrization=completep", "--config.model.parametrization.alpha=2"],
        "model.parametrization.alpha is 2.0; it lies between 0.5 and 1",
    ),
]


@pytest.mark.parametrize("module", ["llm_jax.train", "launch.local"])
@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_mistake_is_one_line_and_leaves_no_trace(place, command, module, arguments, words):
    line = refusal(*command(module, ISOFLOP, ONE_DEVICE, *arguments))
    assert words in line
    assert not missing_fields(line, arguments)
    assert not (place / "runs").exists()
    assert not [path for path in place.rglob("*") if path.suffix in (".lock", ".partial")]


@pytest.mark.parametrize(
    ("experiment", "argument", "words"),
    [
        ("throughput", "--config.shapes.0.width=33", "shape 1 x 32: heads=2 does not divide width=33"),
        ("throughput", "--config.shapes.0.heads=5", "shape 1 x 32: heads=5 does not divide width=32"),
        ("throughput", "--config.shapes.0.layers=0", "shape 1 x 32: layers is 0; it is at least 1"),
        ("throughput", "--config.seconds=0", "seconds is 0.0; it is a positive number"),
        ("lr_transfer", "--config.sweep.depths=2,1", "sweep.depths is (2, 1); sizes grow from 1 or more"),
        (
            "lr_transfer",
            "--config.sweep.depth_kinds=mop,",
            "sweep.depth_kinds: no 'mop'; did you mean 'mup'?",
        ),
        ("wsd_trunk", "--config.sweep.D_tokens=512,", "sweep.D_tokens is (512,); three sizes at least"),
        ("isoflop", "--config.sweep=none", "sweep is none; "),
        ("isoflop", "--config.sweep.span=inf", "sizes must be 5 or more and span above 1"),
        ("isoflop", "--config.sweep.budgets_flops=2e8,2.02e8,4e8", "each at least 5.1% above the one before"),
        ("isoflop", "--config.sweep.holdout_flops=1e40", "tokens of a budget of 1e+40 FLOPs are more than"),
    ],
)
def test_what_an_experiment_can_not_do_is_refused(place, command, experiment, argument, words):
    line = refusal(*command("launch.local", ISOFLOP.replace("isoflop", experiment), argument))
    assert words in line


def test_a_mistake_is_one_line_in_a_process_of_its_own_too(place):
    arguments = sys.executable, "-m", "llm_jax.train", ISOFLOP, "--workers=2"
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    line = refusal(done.returncode, done.stdout, done.stderr)
    assert line == "error: no flag --workers here; it belongs to python -m launch.local, which runs a sweep\n"


def test_steps_to_profile_that_a_run_has_not_are_refused(place, command):
    line = refusal(
        *command("llm_jax.train", ISOFLOP, ONE_DEVICE, "--config.tokens=2048", "--profile_steps=90:95")
    )
    assert re.fullmatch(r"error: --profile_steps=90:95: the run has \d+ steps\n", line)


# ---- folders that hold something else, and runs that are done ----

TINY = [
    "--config.data.corpus=text.txt",
    "--config.tokens=2048",
    "--config.model.layers=1",
    "--config.model.width=16",
    ONE_DEVICE,
]


@pytest.fixture(scope="module")
def trained(place):
    """A run's folder, after four steps."""
    folder = place / "trained"
    base = experiment().get_config("smoke")
    for flag in TINY:
        path, _, value = flag.removeprefix("--config.").partition("=")
        base = config.override(base, path, value)
    train(base, folder)
    return folder


def test_a_complete_run_says_so_and_shows_its_result(trained, command):
    before = files(trained)
    code, out, err = command("llm_jax.train", ISOFLOP, *TINY, f"--folder={trained}")
    assert (code, err) == (None, "")
    assert out.startswith(f"{trained} is complete; nothing was trained\n")
    assert re.search(r"status  done\n +loss  \d\.\d+\n", out)
    assert files(trained) == before


def test_a_run_that_continues_says_from_which_step(trained, command, place):
    folder = shutil.copytree(trained, place / "unfinished")
    (folder / "result.json").unlink()
    code, out, err = command("llm_jax.train", ISOFLOP, *TINY, f"--folder={folder}")
    assert code is None and "status  done" in out
    assert f"{folder}: 4 steps of 512 tokens, continued from step 4\n" in err


STOPPED = """
import os, signal
from llm_jax import experiment_file
isoflop, _ = experiment_file.load_experiment(FILE)
SCALES, get_config = isoflop.SCALES, isoflop.get_config

def hooks(run):
    def stop(step, params):
        if step == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), signal.SIGTERM)
        return {}
    return [stop]
"""


def test_asked_to_stop_a_run_says_what_is_saved_or_ends_if_only_its_scores_are_missing(
    trained, command, place, monkeypatch
):
    (place / "stopped.py").write_text(STOPPED.replace("FILE", repr(str(ROOT / "experiments" / "isoflop.py"))))
    arguments = f"--config={place / 'stopped.py'}:smoke", *TINY, "--config.execution.evaluate_every_steps=2"
    monkeypatch.setenv("STOP_AT", "2")
    folder = place / "asked"
    code, out, _ = command("llm_jax.train", *arguments, f"--folder={folder}")
    assert (code, out) == (143, f"stopped, and saved in {folder}; the same command continues\n")
    monkeypatch.setenv("STOP_AT", "4")
    code, out, _ = command("llm_jax.train", *arguments, f"--folder={folder}")
    assert code is None and "stopped" not in out and "status  done" in out
    result = load_run(folder)["result"]
    assert result["loss"] == load_run(trained)["result"]["loss"]


def test_a_folder_of_another_run_stays_as_it_is(trained, command):
    before = files(trained)
    line = refusal(*command("llm_jax.train", ISOFLOP, *TINY, "--config.seed=7", f"--folder={trained}"))
    assert "belongs to run" in line and "seed is 0 there and 7 here" in line
    assert files(trained) == before


def test_a_checkpoint_of_another_architecture_is_not_continued(trained, command, place):
    folder = place / "foreign"
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    before = files(folder)
    line = refusal(*command("llm_jax.train", ISOFLOP, *TINY, "--config.model.width=32", f"--folder={folder}"))
    assert "the checkpoint is of another architecture: " in line
    assert files(folder).keys() == before.keys()


@pytest.mark.parametrize("module", ["llm_jax.train", "launch.local", "launch.slurm"])
def test_a_bucket_is_refused_without_what_reads_it_and_other_stores_are_refused(command, module, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    buckets._opened.cache_clear()
    line = refusal(*command(module, ISOFLOP, "--folder=gs://bucket/runs"))
    assert 'need the extra gs: pip install "llm-jax[gs]"' in line
    line = refusal(*command(module, ISOFLOP, "--folder=s3://bucket/runs"))
    assert "s3://bucket/runs: folders are on a disk or in a bucket, gs://bucket/name" in line


def test_a_dry_run_needs_no_bucket_and_says_what_it_has_not_seen(command, monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    buckets._opened.cache_clear()
    sweep = "launch.ray_cluster", ISOFLOP, "--folder=gs://bucket/runs"
    code, out, err = command(*sweep, "--dry_run")
    assert code == 0, err
    assert "127.0.0.1:9 can't be reached (Connection refused); planned as if nothing were there" in out
    assert "-m launch.local" in out and "--folder=gs://bucket/runs" in out
    assert "can't be reached" in refusal(*command("launch.local", *sweep[1:]))


def test_a_sweep_is_not_planned_inside_a_run(trained, command):
    before = files(trained)
    line = refusal(*command("launch.local", ISOFLOP, "--dry_run", f"--folder={trained}"))
    assert "is the folder of a single run; name another by --folder" in line
    assert files(trained) == before


def test_a_truncated_catalogue_is_made_anew(trained, command, place):
    catalogues = {path: path.read_bytes() for path in (place / "cache" / "catalogues").glob("*.npz")}
    for path in catalogues:
        path.write_bytes(path.read_bytes()[:300])
    code, out, err = command("llm_jax.train", ISOFLOP, *TINY, f"--folder={trained}")
    assert code is None and "is complete" in out
    named = [path for path in catalogues if f"{path} is damaged: it is made anew" in err]
    assert named and all(path.read_bytes() == catalogues[path] for path in named)


def test_a_truncated_token_store_is_named(trained, command, place):
    for store in (place / "cache" / "tokens").glob("*/tokens.bin"):
        store.write_bytes(store.read_bytes()[:-1])
    line = refusal(*command("llm_jax.train", ISOFLOP, *TINY, "--config.seed=8"))
    assert "tokens.bin has" in line and "delete" in line
