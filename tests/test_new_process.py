"""What only a process shows that has done nothing yet. Torch takes long to load: one goes through all of it, in this order.

What needs no network starts without torch: help, lists, the schema, completion, and a mistake in a spec. What needs torch loads other
libraries only where they are used. A first trace takes no memory for activations. A first step of supervised modules makes the allocator
keep what they free.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.models.index import index
from tests.cli.spec import SPEC

HEAVY = ("torch", "timm", "torchvision", "sklearn", "scipy", "tensorboard", "lightning", "transformers")
FIGURES = ("MiB of a trace", "faults")

#: what is wrong in a spec, how it is written, and what the message says
MISTAKES = [
    ("[[pass]]", "[[pass", "not TOML"),
    ("epochs = 2", "epoch = 2", "unknown key 'epoch'"),
    ('source = "cifar"', 'source = "timm"', "timm has no model 'resnet8'"),
    ('"freeze"', '"freze"', "Did you mean 'freeze'"),
    ('["conv1", "bn1"]', '"conv1"\nlean = 1', "lean"),
    ('["conv1", "bn1"]', "{ first = 1 }", "needs one of path, type or blocks"),
]

PROGRAM = """
import json, os, sys
from graphopt.cli import main
heavy, calls, completions = json.loads(sys.argv[1])
for arguments in calls:
    status = main(arguments)
    print(json.dumps([arguments, status, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
for typed in completions:
    words = ["graphopt", *typed]
    os.environ.update(_GRAPHOPT_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
    print("completion of", *typed, flush=True)
    status = main([])
    print(json.dumps([typed, status, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
del os.environ["_GRAPHOPT_COMPLETE"]
import resource, torch, graphopt
from graphopt.models import cifar_resnet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graphopt.trace(cifar_resnet.build("resnet8"), (3, 64, 64), compare=False)
with torch.device("meta"):
    assert torch.empty(2).is_meta
print("MiB of a trace", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep=",", file=sys.stderr)

main(["inspect", "cifar/resnet8", "--input", "3,8,8"])
print("a trace", *(name for name in heavy if name in sys.modules), sep=",", file=sys.stderr)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(2**20) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

from graphopt.passes.supervise import Supervise
net = cifar_resnet.build("resnet8")
module = graphopt.compile(net, Supervise(modules=2), input=(3, 8, 8), costs=False, verify="off").module.train()
torch.ones(2**20)  # freed, it limits what is kept to 8 MiB
found = [faults(), faults()]
module(torch.randn(2, 3, 8, 8), torch.arange(2))
print("faults", *found, faults(), faults(), sep=",", file=sys.stderr)
from graphopt.data.datasets import open_split
open_split("digits", None, "train")
print("digits", *(name for name in heavy if name in sys.modules), sep=",", file=sys.stderr)
"""


def test_what_a_new_process_loads_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for library in ("timm", "torchvision"):  # the process finds them in the cache
        index.cache_clear()
        index(library)
    for number, (old, new, _) in enumerate(MISTAKES):
        assert old in SPEC
        (tmp_path / f"{number}.toml").write_text(SPEC.replace(old, new, 1))
    calls = [
        ["--version"],
        ["--help"],
        ["train", "--help"],
        ["passes"],
        ["passes", "freeze"],
        ["passes", "--json"],
        ["import", "--set", "model=resnet18"],
    ]
    calls += [["specs"], ["specs", "quickstart"], ["schema"], ["schema", "-o", "s.json"]]
    calls += [[command, "gone.toml"] for command in ("check", "apply", "train", "diff", "inspect")]
    calls += [["fit", "gone.toml", "--memory", "1 GiB"], ["report", "gone"], ["export", "gone", "-o", "x.pt"]]
    calls += [["inspect", "timm/resnet5"], ["inspect", "torchvision/resnet5"]]
    calls += [["check", f"{number}.toml"] for number in range(len(MISTAKES))]
    completions = [
        ["inspect", "torchvision/swin_"],
        ["inspect", "timm/resnet50_"],
        ["inspect", "cif"],
        ["passes", "fr"],
        ["check", "quick"],
        ["study", "share-d"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([HEAVY, calls, completions])],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    reports = [json.loads(line) for line in said if line.startswith("[")]
    assert [report[0] for report in reports] == [*calls, *completions]
    assert [report for report in reports if report[2]] == []
    assert all(status == (0 if number < 11 else 2) for number, (_, status, _) in enumerate(reports[: len(calls)]))
    for _, _, text in MISTAKES:
        assert text in done.stderr
    for text in ("torchvision/swin_t", "timm/resnet50_gn", "cifar/", "freeze", "quickstart", "share-digits"):
        assert text in done.stdout[done.stdout.index("completion of") :].splitlines()
    assert "a trace,torch" in said, "a backbone that is graphopt's own needs no other library"
    assert "digits,torch,timm,torchvision" in said
    figures = {name: [int(part) for part in parts] for name, *parts in (line.split(",") for line in said) if name in FIGURES}
    assert figures["MiB of a trace"][0] < 500
    if platform.libc_ver()[0] == "glibc":  # what it keeps is glibc's rule
        asked_again, kept = figures["faults"][2:]
        assert kept < 0.1 * asked_again, figures["faults"]
