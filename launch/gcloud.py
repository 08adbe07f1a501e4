"""What Google Cloud calls things: slices, what is asked for, and what gcloud says when it fails."""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

from llm_jax.config import UserError
from llm_jax.kernels.slices import GENERATIONS
from llm_jax.values import nearest


class Family(NamedTuple):
    """Slices whose types begin alike. counts: what a chip adds to the number behind the name.

    runtime: the image for JAX, by cloud.google.com/tpu/docs/runtimes. most: chips of the largest slice, where
    there are others than the generation's usual shapes: any number of cubes of 4x4x4 chips.
    """

    generation: str
    counts: int
    runtime: str
    most: int = 0


FAMILIES = {
    "v2": Family("v2", 2, "tpu-ubuntu2204-base"),
    "v3": Family("v3", 2, "tpu-ubuntu2204-base"),
    "v4": Family("v4", 2, "tpu-ubuntu2204-base", most=4096),
    "v5litepod": Family("v5e", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Family("v5p", 2, "v2-alpha-tpuv5", most=6144),
    "v6e": Family("v6e", 1, "v2-alpha-tpuv6e"),
}


def family_of(accelerator: str) -> Family:
    """The family of a type such as v5litepod-8; raises UserError for a type that there isn't."""
    name, dash, size = accelerator.partition("-")
    sizes = {
        known: sorted({family.counts * math.prod(map(int, shape.split("x"))) for shape in shapes})
        for known, family in FAMILIES.items()
        for shapes in [GENERATIONS[family.generation].shapes]
    }
    types = [f"{known}-{number}" for known in sizes for number in sizes[known]]
    if accelerator in types:
        return FAMILIES[name]
    family = FAMILIES.get(name)
    cubes = family and size.isdecimal() and 0 < int(size) <= family.counts * family.most
    if cubes and int(size) % (family.counts * 64) == 0:
        return family
    if name == "v5e":
        accelerator = f"v5litepod-{size}"
    known = nearest(accelerator, types)
    if family:
        cubes = f", and others that {family.counts * 64} divides" * bool(family.most)
        known = f"of {name} there are {', '.join(map(str, sizes[name]))}{cubes}"
    raise UserError(f"--accelerator={name}{dash}{size}: no type of slice that gcloud knows; {known}")


def hosts_of(flag: str, accelerator: str) -> int:
    """How many hosts a slice has, by the name of its type; raises UserError if that can't be read."""
    name, _, size = accelerator.partition("-")
    if name not in FAMILIES or not size.isdecimal():
        raise UserError(f"{flag}: a type and a size, such as v5litepod-8; types are {', '.join(FAMILIES)}")
    chips = int(size) // FAMILIES[name].counts
    return 1 if chips <= GENERATIONS[FAMILIES[name].generation].host else -(-chips // 4)


def name_of(folder: Path) -> str:
    """A name after a folder's, as Google Cloud and Kubernetes take it: of a-z, 0-9 and -, a letter first.

    Longer ones than 40 characters are cut, with a hash of the whole: they take 63, and numbers follow.
    """
    name = re.sub("[^a-z0-9]+", "-", f"runs-{folder.name}".lower()).strip("-")
    own = name.removeprefix("runs-")
    name = own if own[0].isalpha() else name
    digest = hashlib.sha256(folder.name.encode()).hexdigest()[:8]
    return name if len(name) <= 40 else f"{name[:31].rstrip('-')}-{digest}"


# ---- what it says ----

NO_SUCH, EXISTS = "NOT_FOUND", "ALREADY_EXISTS"
_PASSES = re.compile(
    r"RESOURCE_EXHAUSTED|quota(?! project)|capacity|stockout|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL:|ABORTED|"
    r"internal error|HTTPError (429|5\d\d)|timed? ?out|connection|max retries|unable to find the server|"
    r"name resolution",
    re.IGNORECASE,
)


def error(printed: str) -> str:
    """What it complains of, in one line."""
    if "attribute [project]" in printed:
        return "Failed to find attribute [project]: name one by --project"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = lines[-1] if lines else "it failed and printed nothing"  # as of a traceback
    said = next((line for line in lines if line.startswith("ERROR:")), last)
    return re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", said)


def lasts(printed: str) -> bool:
    """Whether to ask again would be in vain: it isn't for want of slices, of quota or of a network."""
    return not _PASSES.search(error(printed))
