"""Writes the manifest of a JobSet for Kubernetes on Google Cloud (GKE): workers on TPU slices.

    python -m launch.jobset --config=experiments/isoflop.py --workers=4 --image=REGISTRY/x --claim=runs \\
        --accelerator=tpu-v5-lite-podslice --topology=2x4 --chips=8 --folder=/runs/isoflop > workers.json
    kubectl apply -f workers.json

Each worker is a job of one pod, which takes runs as long as there are any; one that dies is made again, and
one that the cluster takes back isn't counted as a failure. After `launch.stop` workers save and end, and give
their slices back. The folder is on a volume that all pods see and
whoever looks at it (--claim: a PersistentVolumeClaim, mounted at the folder's parent). Forecasts and the
report are made by `python -m launch.local` with the same arguments, when the workers have ended.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import engine
from llm_jax import config
from llm_jax.config import UserError

SECONDS_TO_SAVE = 120
EIGHT_CHIPS = ("tpu-v5-lite-podslice", "tpu-v5-lite-device", "tpu-v6e-slice")  # a host may have; others: 4
RESTARTS = 20  # of one worker, besides those that the cluster's own doings cost


def manifest(
    name: str,
    command: Sequence[str],
    workers: int,
    image: str,
    claim: str,
    mount: str,
    accelerator: str,
    topology: str,
    chips: int,
) -> dict[str, Any]:
    """The JobSet as JSON values; raises UserError for a slice of more than one host."""
    here = math.prod(map(int, topology.split("x"))) if re.fullmatch(r"\d+(x\d+)+", topology) else 0
    most = 8 if accelerator in EIGHT_CHIPS else 4
    if not 0 < here == chips <= most:
        raise UserError(
            f"--topology={topology} --chips={chips}: a worker is a pod on one host, which has at most {most} "
            f"chips of {accelerator}, and takes all of its slice's: such as --topology=2x2 --chips=4"
        )
    container = {
        "name": "worker",
        "image": image,
        "command": list(command),
        "resources": {"limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "runs", "mountPath": mount}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }
    disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": RESTARTS,
        "podFailurePolicy": {"rules": [disruption]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "worker", "replicas": workers, "template": {"spec": job}}],
        },
    }


def main() -> None:
    experiment, values = config.chosen(), flags.FLAGS
    folder = Path(engine.folder_of(experiment)).absolute()
    command = engine.command_of(experiment, folder, "python")
    kinds = (
        values.image,
        values.claim,
        str(folder.parent),
        values.accelerator,
        values.topology,
        values.chips,
    )
    name = folder.name.lower().replace("_", "-")
    print(json.dumps(manifest(name, command, values.workers, *kinds), indent=1))
    print(f"to give the slices back: kubectl delete jobset {name}", file=sys.stderr)


if __name__ == "__main__":
    engine.define_flags("jobs, each of one slice")
    flags.DEFINE_string("image", None, "a container image with this code in it", required=True)
    flags.DEFINE_string("claim", None, "the PersistentVolumeClaim of the runs' disk", required=True)
    flags.DEFINE_string("accelerator", "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-accelerator")
    flags.DEFINE_string("topology", "2x4", "cloud.google.com/gke-tpu-topology, of one host")
    flags.DEFINE_integer("chips", 8, "of a slice")
    config.run_main(main)
