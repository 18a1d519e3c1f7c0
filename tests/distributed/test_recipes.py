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


def test_the_container_file_has_known_instructions() -> None:
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert lines[0].startswith("FROM ")
