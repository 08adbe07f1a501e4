"""Writes the manifest of JobSets for Kubernetes on Google Cloud (GKE): workers on TPU slices.

    python -m launch.jobset --config=experiments/isoflop.py --workers=4 --image=REGISTRY/x --claim=runs \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --folder=/runs/isoflop > workers.json
    kubectl apply -f workers.json                 # and kubectl delete -f workers.json gives the slices back

Each worker is a JobSet, with a job for its slice (for each of --slices, which train together over the data
centre's network) and a pod for each host. It takes runs as long as there are any. A pod that dies is made
again, for each host RESTARTS times (a limit that Kubernetes knows from 1.29 on), after which its worker has
failed; one that the cluster takes back, or that ends because another one of its worker has, isn't counted.
What the user has to put right (exit code 2) fails the worker at once. The pods of a JobSet find each other by
its own headless service and by what GKE tells them: TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_* of
all its slices, which is why workers don't share one.
After `launch.stop` workers save and end, and give their slices back. The folder is in a bucket (gs://...), or
on a volume that all pods see and whoever looks at it (--claim: a PersistentVolumeClaim, mounted at the
folder's parent). Forecasts and the report are made by `python -m launch.local` with the same arguments, when
the workers have ended.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import engine, gcloud
from llm_jax import command_line, files
from llm_jax.config import UserError
from llm_jax.kernels.slices import GENERATIONS
from llm_jax.values import AGAIN, nearest

SECONDS_TO_SAVE = 120
REFUSED, STOPPED = 2, 143  # a UserError; by SIGTERM
KNOWN = {  # by generation: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
    "tpu-v3-device": "v3",
    "tpu-v3-slice": "v3",
    "tpu-v4-podslice": "v4",
    "tpu-v5-lite-device": "v5e",
    "tpu-v5-lite-podslice": "v5e",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
    "tpu7x": "tpu7x",
}
RESTARTS = 20  # of each host, besides those that the cluster's own doings cost
POOL = "cloud.google.com/gke-nodepool"  # a slice of several hosts is a pool of nodes


def hosts_of(accelerator: str, topology: str, chips: int | None) -> tuple[int, int]:
    """(hosts of a slice, chips of each); chips: of each, where the user says so. Raises UserError."""
    if accelerator not in KNOWN:
        raise UserError(f"--accelerator={accelerator}: GKE has no such TPUs; {nearest(accelerator, KNOWN)}")
    shapes, *_, most = GENERATIONS[KNOWN[accelerator]]
    sides = [int(side) if side.isdecimal() else 0 for side in topology.split("x")]
    cubes = shapes[0].count("x") == 2
    if topology not in shapes and not (cubes and len(sides) == 3 and all(n and n % 4 == 0 for n in sides)):
        others = ", and others whose three sides 4 divides" * cubes
        raise UserError(f"--topology={topology}: of {accelerator} there are {', '.join(shapes)}{others}")
    total = math.prod(sides)
    each = chips or (total if total <= most else 4)
    if each > most or total % each:
        raise UserError(
            f"--topology={topology} --chips={each}: a slice of {total} chips is of hosts with as many each, "
            f"of {accelerator} {most} at most"
        )
    return total // each, each


def manifest(
    name: str,
    command: Sequence[str],
    image: str,
    claim: str | None,
    mount: str,
    accelerator: str,
    topology: str,
    chips: int | None = None,
    slices: int = 1,
) -> dict[str, Any]:
    """One worker's JobSet as JSON values; raises UserError for a slice that there can't be."""
    hosts, chips = hosts_of(accelerator, topology, chips)
    container = {
        "name": "worker",
        "image": image,
        "command": list(command),
        "resources": {"limits": {"google.com/tpu": chips}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "containers": [container],
    }
    if claim:
        container["volumeMounts"] = [{"name": "runs", "mountPath": mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
    # Rules are read in order. A disruption comes first: a disk that goes with its node is no user's error.
    disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    lost_another = {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [AGAIN, STOPPED]}}
    refused = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [REFUSED]}}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimitPerIndex": RESTARTS,
        "maxFailedIndexes": 0,
        "podFailurePolicy": {"rules": [disruption, lost_another, refused]},
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": name}
    if hosts > 1:  # or its pods would be strewn over several slices
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": POOL}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def main() -> None:
    experiment, values = command_line.chosen(), flags.FLAGS
    if values.dry_run:
        raise UserError("--dry_run: launch.jobset asks for nothing, it only writes what kubectl is given")
    if not values.image:
        raise UserError("of which container image? --image=REGISTRY/NAME, with this code in it")
    if not re.fullmatch(r"[\w.:/@-]+", values.image):
        raise UserError(f"--image={values.image!r} is no container image, such as REGISTRY/NAME:TAG")
    if values.claim and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", values.claim):
        raise UserError(f"--claim={values.claim!r} is no name in Kubernetes: a-z, 0-9, - and . inside")
    folder = engine.folder_of(experiment).absolute()
    if bool(values.claim) == files.in_bucket(folder):
        raise UserError(
            f"--folder={folder}: on a disk it needs --claim, its PersistentVolumeClaim, and in a bucket none"
        )
    hosts, _ = hosts_of(values.accelerator, values.topology, values.chips)
    engine.refuse_each(hosts * values.slices)
    name = gcloud.name_of(folder)
    command = engine.command_of(experiment, folder, "python")
    kind = (values.image, values.claim, str(folder.parent), values.accelerator, values.topology, values.chips)
    workers = [
        manifest(f"{name}-{number}", command, *kind, values.slices) for number in range(values.workers)
    ]
    print("to give the slices back: kubectl delete -f on what was applied", file=sys.stderr)
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": workers}, indent=1))


if __name__ == "__main__":
    engine.define_flags("JobSets, each with a slice")
    flags.DEFINE_string("image", None, "a container image with this code in it")
    flags.DEFINE_string("claim", None, "the PersistentVolumeClaim of the runs' disk, if they lie on one")
    flags.DEFINE_string("accelerator", "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-accelerator")
    flags.DEFINE_string("topology", "2x4", "cloud.google.com/gke-tpu-topology")
    each = "of each host; else all of a slice, or 4 where it has several hosts"
    flags.DEFINE_integer("chips", None, each, lower_bound=1)
    flags.DEFINE_integer("slices", 1, "of each worker", lower_bound=1)
    command_line.run_main(main)
