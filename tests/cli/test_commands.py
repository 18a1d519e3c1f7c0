"""Each command with valid input, through `main`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graphopt.cli import COMMANDS, app, main
from graphopt.cost import Rates
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.planning.loading import LoaderRate
from graphopt.spec import load, loads
from tests.cli.spec import SPEC

FIGURES = {
    *("parameters", "trainable_parameters", "forward_flops", "backward_flops"),
    *("saved_activation_bytes", "peak_bytes", "peak_activation_bytes"),
}


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed, with nothing on standard error."""
    status = main(list(arguments))
    out, err = capsys.readouterr()
    assert status == 0, err
    assert not err
    return out


def output_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def test_apply_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = output_json(capsys, "apply", "s.toml")
    assert {"name", "digest", "batch", "before", "after", "passes"} <= report.keys()
    assert report["name"] == "small"
    assert report["batch"] == 20
    assert report["digest"] == load("s.toml").digest
    for side in ("before", "after"):
        assert report[side].keys() >= FIGURES
    assert report["after"]["trainable_parameters"] == report["before"]["trainable_parameters"] - 16 * 9 - 32
    assert report["after"]["saved_activation_bytes"] < report["before"]["saved_activation_bytes"]
    (item,) = report["passes"]
    assert item["use"] == "freeze"
    assert item["regions"] == ["conv1", "bn1"]
    assert item["line"] == 7
    assert {entry["property"] for entry in item["verified"]} >= {"eval output", "state-dict keys", "gradients of unselected parameters"}


def test_apply_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "apply", "s.toml")
    for part in ("small", "trainable parameters", "saved activations", "pass 1 freeze, line 7", "conv1, bn1", "verified: "):
        assert part in out


def test_apply_writes_a_folder_and_replaces_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "apply", "s.toml", "-o", "deep/plan")
    names = {path.name for path in Path("deep/plan").iterdir()}
    assert names >= {"spec.toml", "report.json", "graph.txt"}
    assert loads(Path("deep/plan/spec.toml").read_text()) == load("s.toml")
    assert "layer1.0.conv1" in Path("deep/plan/graph.txt").read_text()
    again = output_json(capsys, "apply", "deep/plan", "-o", "deep/plan", "--set", "train.batch=4")
    assert json.loads(Path("deep/plan/report.json").read_text()) == again
    assert again["batch"] == 4
    assert [path.name for path in Path("deep").iterdir()] == ["plan"]


def test_apply_at_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    when = ["--set", "pass.0.when={ epoch = 1 }"]
    assert "trigger has not fired" in output(capsys, "apply", "s.toml", *when)
    assert output_json(capsys, "apply", "s.toml", *when)["passes"][0]["regions"] == []
    assert output_json(capsys, "apply", "s.toml", *when, "--epoch", "1")["passes"][0]["regions"] == ["conv1", "bn1"]


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    found = output_json(capsys, "check", "s.toml")
    assert found["passes"][0]["regions"] == ["conv1", "bn1"]
    assert [phase["cuda"]["device"] for phase in found["device_memory"]] == ["A100"]
    out = output(capsys, "check", "s.toml")
    assert "would act on: conv1, bn1" in out
    assert "no conflicts" in out
    assert "time, a forecast" not in out


def test_a_gpu_s_memory_is_forecast_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    report = output_json(capsys, "apply", "s.toml", "--device", "h100")
    for side in ("before", "after"):
        assert report[side]["peak_bytes"] < report[side]["capacity_bytes"] <= report[side]["peak_reserved_bytes"]
        assert report[side]["cuda"]["device"] == "H100"
    out = output(capsys, "check", "s.toml")
    assert "memory of a step on an NVIDIA A100, simulated; no GPU was used" in out
    assert '--device "A100" shows the smallest capacity at which the step still runs' in out
    assert "band   cuDNN workspace" in out
    assert "smallest capacity" in output(capsys, "check", "s.toml", "--device", "A100").partition("on an NVIDIA A100")[2].splitlines()[1]
    out = output(capsys, "fit", "s.toml", "--device", "RTX 4090", "--memory", "32 MiB")
    assert "budget: NVIDIA RTX 4090, memory 32.0 MiB" in out
    assert "peak reserved" in out


def test_check_of_no_passes_and_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain-net.toml").write_text(SPEC.replace('name = "small"\n', "").partition("[[pass]]")[0] + SPEC[SPEC.index("[data]") :])
    out = output(capsys, "check", "plain-net.toml")
    assert out.startswith("plain-net  (cifar/resnet8")
    assert " -> " not in out
    assert "0FLOP" not in out
    assert output(capsys, "apply", "plain-net.toml").startswith("plain-net  (digest")
    assert "filling 0 FLOP of these" in output(capsys, "check", "s.toml")


def test_check_forecasts_each_of_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "check", "s.toml", "--ranks", "2", "--link", "10 Gbit/s", "--set", "train.device=cpu")
    assert "each of 2 ranks (ddp): 10 images at once" in out
    assert "as gloo sends them" in out
    assert "all-reduce" in out
    assert main(["check", "s.toml", "--ranks", "3"]) == 2
    assert "Use 18 or 21" in capsys.readouterr().err
    assert main(["check", "s.toml", "--ranks", "2", "--link", "fast"]) == 2
    assert "--link: not a rate: 'fast'" in capsys.readouterr().err


def test_check_forecasts_a_chain_of_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cost.rates.rates_of", lambda *_: Rates(1e-11, 1e-10, 1e-5, 0.1, "cpu"))
    cuts = 'use = "supervise"\ncuts = ["layer1.0", "layer2.0"]\ndecoder = "none"'
    Path("m.toml").write_text(SPEC.replace('use = "freeze"\nselect = ["conv1", "bn1"]', cuts))
    out = output(capsys, "check", "m.toml", "--ranks", "2", "--strategy", "modules")
    assert "2 ranks in a chain (modules): 20 images at once" in out
    assert "times one process's" in out
    assert "of an epoch of 2 steps" in out
    assert main(["check", "s.toml", "--ranks", "2", "--strategy", "modules"]) == 2
    assert "Add a supervise pass" in capsys.readouterr().err


def test_check_times_no_steps_for_settings_that_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cost.rates.measure_rates", lambda *_, **__: pytest.fail("steps are timed"))
    timed = 'use = "supervise"\nmodules = 2\nbalance = "time"'
    Path("m.toml").write_text(SPEC.replace('use = "freeze"\nselect = ["conv1", "bn1"]', timed))
    assert main(["check", "m.toml", "--set", "train.strategy=modules", "--set", "train.amp=float16", "--set", "train.device=cpu"]) == 2
    assert 'Use amp = "bfloat16"' in capsys.readouterr().err


def test_check_forecasts_the_time_where_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cost.rates.rates_of", lambda *_: Rates(1e-11, 1e-10, 1e-5, 0.1, "cpu"))
    monkeypatch.setattr("graphopt.cli.timing.measured_loader", lambda _: LoaderRate(10.0, 0))
    out = output(capsys, "check", "s.toml", "--time")
    assert "  time, a forecast: " in out
    assert "steps timed on cpu; loader 10 images/s, measured here" in out
    time = output_json(capsys, "check", "s.toml", "--time", "--device", "L4")["run_time"]
    assert (time["device"], time["measured"]) == ("L4", False)
    assert [phase["binds"] for phase in time["phases"]] == ["loader"]
    assert time["phases"][0]["length"] == time["phases"][0]["step"] + time["phases"][0]["loading"]


def test_check_says_where_the_time_on_a_gpu_comes_from(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cli.timing.measured_loader", lambda _: None)
    out = output(capsys, "check", "s.toml", "--time", "--device", "H100")
    assert "  least time, at peak rates: " in out
    assert "steps at the peak rates of an NVIDIA H100, not measured; loader not measured: the images are not here" in out


def test_train_resume_and_export(capsys: pytest.CaptureFixture[str]) -> None:
    summary = output_json(capsys, "train", "s.toml", "-s", "train.epochs=1")
    assert summary["folder"] == "runs/s"
    assert "there is no run in runs/s-2 yet: it begins" in output(capsys, "train", "s.toml", "-o", "runs/s-2", "--resume")
    assert Path("runs/s-2/summary.json").exists()
    output(capsys, "train", "s.toml", "-q", "--seed", "3")
    assert load("runs/s-3").train.seed == 3
    out = output(capsys, "train", "s.toml", "-o", "runs/s", "--resume")
    assert "epoch 1/1" in out
    made = output_json(capsys, "export", "runs/s", "-o", "m.safetensors")
    assert made == {"written": "m.safetensors", "bytes": Path("m.safetensors").stat().st_size, "form": "weights"}
    assert output_json(capsys, "report", "runs/s", "--no-costs") == {"written": "runs/s/report.html", "ledger": []}
    state = load_file("m.safetensors")
    module = CifarResNet(8, in_chans=1)
    module.load_state_dict(state, strict=True)
    assert torch.isfinite(module.eval()(torch.zeros(1, 1, 8, 8))).all()
    # And back in: the exported weights are a spec's weights.
    output(capsys, "check", "s.toml", "--set", "backbone.weights=m.safetensors")


def test_inspect_a_library_s_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = output_json(capsys, "inspect", "timm/resnet50")
    assert found["parameters"] == 25_557_032
    assert len(found["blocks"]) == 16
    assert len(found["cut_points"]) == 39
    rows = {row["name"]: row for row in found["tree"]}
    assert rows["layer1.0"]["output"] == ["N", 256, 56, 56]
    assert rows["layer1.0"]["closed"]
    assert rows["layer1.0"]["cut_point"]
    assert rows["layer1.0"]["parameters"] == 75_008


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "inspect", "cifar/resnet20", "--input", "3x16x16")
    assert "input (N, 3, 16, 16), 272,474 parameters, 9 blocks" in out
    assert "layer3.2 *" in out
    assert "(N, 64, 4, 4)" in out
    assert "3 blocks" in output(capsys, "inspect", "s.toml")


def test_inspect_code_with_trust(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "inspected_model.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = output(capsys, "inspect", "python/inspected_model:make", "--input", "3,4,4", "--trust")
    assert "(N, 4, 4, 4)" in out


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "freeze" in output(capsys, "passes")
    manual = output(capsys, "passes", "freeze")
    for part in ("select", "required", '"start"', "preserves: ", "[[pass]]"):
        assert part in manual
    found = output_json(capsys, "passes")
    for name in found:
        assert not re.search(r"tools/|\w\.py`", output(capsys, "passes", name)), f"{name}: a user has no files of the repository"
    assert found["freeze"]["summary"]
    assert "select" in found["freeze"]["properties"]


def test_specs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "quickstart" in output(capsys, "specs")
    assert output_json(capsys, "specs")["quickstart"]["passes"] == ["freeze"]
    Path("mine.toml").write_text(output(capsys, "specs", "quickstart"))
    assert load("mine.toml") == load("quickstart")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "schema")
    output(capsys, "schema", "-o", "s.json")
    assert Path("s.json").read_text() == printed
    assert json.loads(printed)["title"] == "graphopt spec"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version").startswith("graphopt 0.")
    assert output(capsys, "-V") == output(capsys, "--version")
    out = output(capsys, "--help")
    names = [entry.name for entry in app.registered_commands if entry.name]
    assert len(names) == len(COMMANDS)
    for name in names:
        assert name in out
        text = output(capsys, name, "-h")
        assert "graphopt " + name in text, f"{name} --help has no example"
        assert "<bool>" not in text, "a flag takes no value"


@pytest.mark.parametrize(
    "arguments",
    [["aply", "x"], ["apply"], ["apply", "s.toml", "--nope"], ["apply", "s.toml", "--batch", "0"], ["diff", "s.toml", "--png", "--trust"]],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_installed_command_and_the_module() -> None:
    for command in (["graphopt"], ["-m", "graphopt"]):
        run = [sys.executable, *command] if command[0] == "-m" else [str(Path(sys.executable).parent / "graphopt")]
        done = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("graphopt 0.")
        failed = subprocess.run([*run, "apply", "gone"], capture_output=True, text=True, check=False)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["apply", "--help"], ["schema", "--nope"]])
def test_torch_is_not_loaded_before_a_command_runs(arguments: list[str]) -> None:
    code = "import sys; from graphopt.cli import main; main(sys.argv[1:]); print(sorted({'torch', 'timm'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    command = str(Path(sys.executable).parent / "graphopt")
    environment = {"_GRAPHOPT_COMPLETE": f"source_{shell}", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run([command], capture_output=True, text=True, env=environment, check=False)
    assert "_GRAPHOPT_COMPLETE" in done.stdout


def test_fit_says_first_what_fits_and_prints_what_to_paste(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = output(capsys, "fit", "s.toml", "--memory", "1 GiB", "--suggest")
    assert out.startswith("fits as it is: nothing needs to be added\n")
    assert "stays exact" in out
    assert "[[pass]]" not in out
    output(capsys, "fit", "s.toml", "--memory", "1 GiB", "-o", "fitted.toml")
    assert len(Path("fitted.toml").read_text().splitlines()) < 20, "what the spec said, and the batch; no defaults"
    assert load("fitted.toml").passes == load("s.toml").passes
    monkeypatch.setattr("graphopt.planning.budget.Search.__init__", None)  # what is refused needs no search
    assert main(["fit", "s.toml", "--memory", "1 GiB", "--flops", "0.5"]) == 2
    assert "FLOPs per sample do not depend on it" in capsys.readouterr().err


def test_inspect_shows_what_is_gathered_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = output_json(capsys, "inspect", "s.toml", "--units")["units"]
    assert {"blocks", "sections", "root", "replicated", "unused"} == found.keys()
    assert "gathered for the whole step: " in output(capsys, "inspect", "cifar/resnet20", "--units")
