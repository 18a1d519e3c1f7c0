"""The wheel: what is in it, and that it runs where there is no checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.ranks import run_process

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout's tracked and untracked sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


def test_every_module_of_the_package_is_in_it(names: set[str]) -> None:
    assert {f"graphopt/{name}" for name in sources("graphopt", "*.py")} <= names
    assert {f"graphopt/passes/{name}" for name in sources("passes", "*.py")} <= names
    assert {f"graphopt/specs/{name}" for name in sources("specs", "*.toml")} <= names


def test_data_files_are_in_it(names: set[str]) -> None:
    assert "graphopt/py.typed" in names
    data = {path for path in sources("graphopt", "*") if (ROOT / "graphopt" / path).is_file() and not path.endswith(".py")}
    assert {f"graphopt/{name}" for name in data} <= names


def test_nothing_else_is_in_it(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"graphopt"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_entry_points_name_what_is_there(names: set[str]) -> None:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["graphopt.passes"]
    for name, value in entries.items():
        module = value.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & names, name
    folders = {path.name for path in (ROOT / "passes").iterdir() if (path / "__init__.py").exists()}
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__", "layers"}  # layers: what several of them put in
    assert entries.keys() == folders | files


TINY = ["--set", "data.train_limit=64", "--set", "data.eval_limit=32", "--set", "backbone.name=resnet8"]


def _train_from(site: Path, said: Path) -> None:
    """Trains and exports, with the heavy dependencies that are loaded here and graphopt as it is installed in `site`."""
    for name in [name for name in sys.modules if name.split(".")[0] == "graphopt"]:
        del sys.modules[name]
    sys.path.insert(0, str(site))
    from graphopt.cli import main

    assert main(["train", "quickstart", "-o", "run", "--set", "train.epochs=5", *TINY]) == 0
    assert main(["export", "run", "-o", "model.safetensors"]) == 0
    said.write_text("\n".join(str(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] == "graphopt"))


@pytest.mark.slow
def test_it_trains_outside_the_checkout(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert (site / "bin" / "graphopt").exists()
    monkeypatch.chdir(tmp_path)
    assert run_process(_train_from, site, tmp_path / "said") == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) > 50
    assert [line for line in said if not line.startswith(str(site / "graphopt"))] == []
    assert (tmp_path / "model.safetensors").exists()
