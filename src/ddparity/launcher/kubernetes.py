"""The TrainJob of the Kubeflow Trainer (v2) in which each machine runs one `ddparity run`, and its submission."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .submit import Submission, hand_over


def manifest(job: Submission) -> str:
    """The TrainJob, for the Trainer's runtime `torch-distributed`, as YAML.

    The Trainer sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in each pod, which `run` reads.
    Source: https://www.kubeflow.org/docs/components/trainer/

    Raises:
        ValueError: no image was given.
    """
    if not job.image:
        raise ValueError("--kubernetes IMAGE: give the container image that has ddparity and the script")
    # Strings in JSON are strings in YAML, whatever they contain.
    nproc = f"\n    numProcPerNode: {int(job.nproc)}" if job.nproc is not None and job.nproc.isdigit() else ""
    command = "\n".join(f"      - {json.dumps(word)}" for word in ("ddparity", "run", *job.arguments))
    return _MANIFEST.format(
        name=_name(job.script), image=json.dumps(job.image), nnodes=job.nnodes, nproc=nproc, command=command
    )


_MANIFEST = """\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {image}
    numNodes: {nnodes}{nproc}
    # GPUs: resourcesPerNode, limits, nvidia.com/gpu, as many as processes.
    command:
{command}
"""


def _name(script: str) -> str:
    """A name as Kubernetes takes it: letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")
    return (words if words[:1].isalpha() else f"train-{words}")[:50].strip("-")


def submit_to_kubernetes(job: Submission) -> int:
    """Create the TrainJob, or print it with `--dry-run`; returns the exit code.

    Raises:
        ValueError: there is no kubectl on this machine.
    """
    otherwise = "see the manifest with --dry-run, and create it elsewhere"
    return hand_over(manifest(job), ["kubectl", "create", "-f", "-"], job.dry_run, otherwise)
