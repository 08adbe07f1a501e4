"""The house's rule: a room imports what stands below it, never upwards, nor in circles."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


ROWS = [
    ["config", "command_line", "experiment_file", "files", "buckets", "values", "profiling"],
    ["kernels", "sharding", "distributed"],
    ["models", "data"],
    ["checkpoints", "manifest", "records", "parts", "claims", "store", "environment", "events", "progress"],
    ["optimizers", "links", "transfer", "schedules", "losses", "interop"],
    [
        "program",
        "placement",
        "coordinates",
        "step",
        "run",
        "facts",
        "held_out",
        "trunks",
        "process",
        "inference",
        "gradient_noise",
    ],
    ["evaluation"],
    ["pack", "train", "loop", "member"],
    ["scaling", "ladder", "posttraining"],
    ["score", "generate", "chat", "evaluate", "export", "aot"],
]
FLOOR = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def imports():
    """(importing file, imported module) for every import in the package."""
    for path in sorted((ROOT / "llm_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def room(path):
    part = path.relative_to(ROOT / "llm_jax").parts[0]
    return part.removesuffix(".py")


def test_every_module_has_a_floor():
    rooms = {room(path) for path in (ROOT / "llm_jax").rglob("*.py")}
    known = {*FLOOR, "__init__"}
    assert rooms <= known, rooms - known


def test_no_import_runs_upwards():
    upward = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, module in imports()
        if module.split(".")[0] in ("experiments", "launch", "analysis", "tests")
        or (module.startswith("llm_jax.") and FLOOR.get(module.split(".")[1], -1) > FLOOR.get(room(path), 9))
    ]
    assert not upward


def test_rooms_do_not_import_each_other_in_circles():
    needs = {}
    for path, module in imports():
        if module.startswith("llm_jax.") and module.split(".")[1] != room(path):
            needs.setdefault(room(path), set()).add(module.split(".")[1])
    assert list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError, which shows the circle


def test_scaling_reads_tables_only():
    rooms = {m.split(".")[1] for path, m in imports() if room(path) == "scaling" and m.startswith("llm_jax.")}
    assert rooms <= {"config", "command_line", "files", "records", "scaling"}
