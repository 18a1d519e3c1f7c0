"""Files that start runs elsewhere are at least well-formed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docs" / "launch"


@pytest.mark.parametrize("name", ["one-node.sh", "many-nodes.sh", "slurm.sbatch"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_manifests_are_yaml() -> None:
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"


def test_the_jobset_is_one_job_with_a_pod_per_machine_that_meet_at_the_first() -> None:
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    options = dict(part.split("=") for part in container["command"] if "=" in part)
    assert pods["completionMode"] == "Indexed", "pods have names only then"
    assert pods["parallelism"] == pods["completions"] == int(options["--nnodes"])
    name = jobset["metadata"]["name"]
    host, port = options["--rdzv-endpoint"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{name}", "JobSet's names: set, job, job's number, pod's number, and the set as subdomain"
    assert int(port) in [one["containerPort"] for one in container["ports"]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    train = container["command"].index("-m")
    assert container["command"][train : train + 3] == ["-m", "graphopt", "train"]


def test_the_container_file_has_known_instructions() -> None:
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert lines[0].startswith("FROM ")
