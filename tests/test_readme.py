"""What README says is run: its commands, its specs, its Python, and its pass as a third party's package."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from graphopt.cli import main
from graphopt.cost import Rates
from graphopt.spec import loads
from tests.support.ranks import run_process, serve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TINY = "--set train.epochs=5 --set data.train_limit=64 --set data.eval_limit=32 --set backbone.name=resnet8"


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def shell(command: str, folder: Path, **environment: str) -> str:
    """Runs a line in a shell, with the environment's own `graphopt` and `python` first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Inside `make test`, a make of ours must not take itself for a part of that one.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, env={**outer, "PATH": path, **environment}, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a line in the working directory: `graphopt` and `python -c` in this process: loading torch takes longer than most commands."""
    line, _, file = command.partition(" > ")
    words = shlex.split(line)
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
        return capsys.readouterr().out
    if words[0] != "graphopt" or set(words) & {"|", "&&"}:
        return shell(command, Path.cwd())
    status = main(words[1:])
    out, err = capsys.readouterr()
    assert status == 0, f"{command}\n{out}\n{err}"
    if file:
        Path(file).write_text(out)
    return out


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for text in blocks("sh") for line in text.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graphopt.cost.rates.rates_of", lambda *_: Rates(1e-11, 1e-10, 1e-5, 0.1, "cpu"))  # seconds of timed steps
    serve()  # the study's processes
    found = [command for command in commands() if not command.startswith("make ")]
    assert len(found) == 14
    Path("study.toml").write_text(next(text for text in blocks("toml") if "seeds" in text))
    Path("args.yaml").write_text("model: resnet18\nlr: 0.1\n")
    for command in found:
        run(f"{command} {TINY}" if command.startswith(("graphopt train", "graphopt study")) else command, capsys)
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "plan" / "report.json").exists()
    for page in ("run.html", "c.html"):
        assert "</html>" in (tmp_path / page).read_text()


@pytest.mark.slow
def test_the_demo_s_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line that `make demo` runs after its set-up, on less data."""
    monkeypatch.chdir(tmp_path)
    recipe = shell("make -n demo PYTHON=python3", ROOT).replace("\\\n", "")
    lines = [line for line in recipe.splitlines() if not re.search(r"pip install|^touch |-m venv", line)]
    assert any("graphopt train quickstart" in line for line in lines)
    for line in lines:
        line = line.replace(".venv/bin/", "")
        tiny = "--set train.epochs=5 --set data.train_limit=64 --set data.eval_limit=32"
        out = run(f"{line} {tiny}" if line.startswith("graphopt train") else line, capsys)
    assert "All keys matched" in out


def test_the_make_targets_exist() -> None:
    for command in [command for command in commands() if command.startswith("make ")]:
        shell(f"{command.replace('make', 'make -n')}", ROOT)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_specs_are_sound() -> None:
    specs = [text for text in blocks("toml") if "[backbone]" in text]
    assert len(specs) == 2
    for text in specs:
        assert loads(text, file="README.md").passes


def api() -> str:
    return next(text for text in blocks("python") if "plan.export()" in text)


def test_the_api_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(compile(api(), "README.md", "exec"), scope)
    before, after = (int(part) for part in capsys.readouterr().out.split(" -> "))
    assert after < before
    assert type(scope["backbone"]).__name__ == "ResNet"
    assert len([line for line in api().splitlines() if line.strip()]) <= 12


def test_the_loop_with_local_losses_runs() -> None:
    scope: dict[str, torch.Tensor] = {}
    exec(compile(next(text for text in blocks("python") if "Supervise(" in text), "README.md", "exec"), scope)
    assert scope["scores"].shape == (8, 10)


DAMPED = '[backbone]\nsource = "cifar"\nname = "resnet8"\ninput = [3, 8, 8]\n[[pass]]\nuse = "{use}"\nselect = "layer2"\nfactor = 0.25\n'


def damp() -> str:
    return next(text for text in blocks("python") if "class Damp" in text)


def test_the_pass_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damp.py").write_text(damp())
    (tmp_path / "s.toml").write_text(DAMPED.format(use="damp.py:Damp"))
    out = run("graphopt apply s.toml --trust", capsys)
    for part in ("regions: layer2", "eval output (equal)", "training output (equal)"):
        assert part in out


def _with_damp(site: Path, said: Path) -> None:
    """What graphopt prints where the package is installed."""
    sys.path.insert(0, str(site))
    printed = []
    for line in (["passes"], ["passes", "damp"], ["apply", "s.toml"], ["schema"]):
        with redirect_stdout(io.StringIO()) as out:
            assert main(line) == 0
        printed.append(out.getvalue())
    said.write_text(json.dumps(printed))


@pytest.mark.slow
def test_the_pass_as_a_third_party_s_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "damp.py").write_text(damp())
    entry = next(text for text in blocks("toml") if "entry-points" in text)
    head = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    (source / "pyproject.toml").write_text(
        f'{head}[project]\nname = "damp"\nversion = "1"\n{entry}[tool.setuptools]\npy-modules = ["damp"]\n'
    )
    shell(f"python -m pip install -q --no-deps --no-build-isolation --target {tmp_path / 'site'} {source}", tmp_path)
    (tmp_path / "s.toml").write_text(DAMPED.format(use="damp"))
    monkeypatch.chdir(tmp_path)
    assert run_process(_with_damp, tmp_path / "site", tmp_path / "said") == 0
    listed, manual, applied, schema = json.loads((tmp_path / "said").read_text())
    assert "damp" in listed
    assert "scaled" in manual
    assert "eval output (equal)" in applied
    assert '"damp"' in schema
    # Nothing but the entry point makes it known.
    assert main(["apply", "s.toml"]) == 2
    assert "unknown pass 'damp'" in capsys.readouterr().err


def test_every_pass_is_in_the_table() -> None:
    from graphopt.compiler.registry import passes

    for use in passes():
        assert f"| `{use}` |" in README
