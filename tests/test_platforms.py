"""Windows and macOS have no `fcntl`, no `resource`, no positioned reads: everything imports and trains without them."""

import json
import os
import pkgutil
import signal
import sys
from importlib import import_module
from pathlib import Path

import graphopt
from tests.support.ranks import run_process

ABSENT = {
    os: ("preadv", "pwrite", "posix_fallocate", "fork", "setsid", "register_at_fork", "getuid", "mkfifo"),
    signal: ("pthread_sigmask", "SIGKILL", "SIGHUP", "SIGUSR1"),
}


def _elsewhere(folder: Path) -> None:
    """All modules anew, on a system that lacks what Windows lacks; then a run that drops with cached features, and goes on from there."""
    for module, names in ABSENT.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    for name in [name for name in sys.modules if name.partition(".")[0] == "graphopt"]:
        del sys.modules[name]
    fresh = import_module("graphopt")
    for module in pkgutil.walk_packages(fresh.__path__, "graphopt."):
        import_module(module.name)
    main = import_module("graphopt.cli").main
    settings = (
        'backbone.name="resnet20"',
        "backbone.input=[1,8,8]",
        "train.epochs=2",
        "data.train_limit=64",
        "data.eval_limit=32",
        "train.batch=32",
    )
    table = 'pass=[{use="drop", upto="layer1", when={epoch=1}, cache="disk"}]'
    options = [part for value in (*settings, table) for part in ("--set", value)]
    assert main(["train", "quickstart", "-o", str(folder / "run"), *options]) == 0
    assert main(["export", str(folder / "run"), "-o", str(folder / "net.safetensors")]) == 0


def test_everything_imports_and_trains_without_what_windows_lacks(tmp_path: Path) -> None:
    assert run_process(_elsewhere, tmp_path) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert (tmp_path / "net.safetensors").is_file()
    assert graphopt.__version__
