"""A study's file: what it may say, and the runs that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.compiler.plan import compile_phase
from graphopt.driver import prepare
from graphopt.errors import SpecError
from graphopt.spec import load
from graphopt.studies.study import Member, identity, installed, members, read_study
from tests.cli.spec import SPEC


def runs(tmp_path: Path, text: str, *overrides: str) -> list[Member]:
    (tmp_path / "s.toml").write_text(SPEC)
    (tmp_path / "study.toml").write_text(text)
    return members(*read_study(str(tmp_path / "study.toml")), overrides=overrides)


def test_a_grid_with_seeds(tmp_path: Path) -> None:
    text = 'spec = "s.toml"\nseeds = [3, 4]\n[set]\ntrain.epochs = 1\n[grid]\ntrain.optimizer.lr = [0.1, 0.05]\ntrain.batch = [10, 20]\n'
    found = runs(tmp_path, text)
    assert list(dict.fromkeys(member.row for member in found)) == [f"lr={lr}, batch={n}" for lr in ("0.1", "0.05") for n in (10, 20)]
    assert [member.seed for member in found] == [3, 4] * 4
    first, last = found[0].spec.train, found[-1].spec.train
    assert (first.seed, first.optimizer.lr, first.batch, first.epochs) == (3, 0.1, 10, 1)
    assert (last.seed, last.optimizer.lr, last.batch, last.epochs) == (4, 0.05, 20, 1)
    assert len({member.folder for member in found}) == 8


def test_variants_with_specs_of_their_own(tmp_path: Path) -> None:
    text = 'spec = "s.toml"\n[[variant]]\nname = "none"\nset = { pass = [] }\n[[variant]]\nname = "other"\nspec = "quickstart"\n'
    none, other = runs(tmp_path, text, "train.epochs=2")
    assert none.spec.passes == ()
    assert none.spec.backbone.name == "resnet8"
    assert other.spec.backbone.name == "resnet20"
    assert none.spec.train.epochs == other.spec.train.epochs == 2
    assert none.folder.startswith("none-seed0-")


def test_each_row_of_a_grid_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    text = (
        'spec = "s.toml"\nbaseline = "none"\n[grid]\ntrain.optimizer.lr = [1e-3, 0.05]\n[[variant]]\nname = "none"\nset = { pass = [] }\n'
    )
    text += '[[variant]]\nname = "cold"\n[[variant]]\nname = "colder"\nset.pass = []\nset.train.batch = 10\nbaseline = "cold, lr=0.05"\n'
    found = {member.row: member.baseline for member in runs(tmp_path, text)}
    assert found == {
        **{f"{name}, lr={lr}": f"none, lr={lr}" for name in ("none", "cold") for lr in ("0.001", "0.05")},
        **{f"colder, lr={lr}": "cold, lr=0.05" for lr in ("0.001", "0.05")},
    }


def test_what_a_run_computes_identifies_it() -> None:
    base = load("quickstart")
    same = ["name=x", "train.device=cpu", "data.root=/elsewhere", "data.workers=2", "train.keep=5"]
    other = ["train.seed=1", "train.epochs=9", "pass.0.when.epoch=2", "data.train_limit=9", "backbone.name=resnet32"]
    assert {identity(load("quickstart", overrides=[text])) for text in same} == {identity(base)}
    found = {identity(load("quickstart", overrides=[text])) for text in other}
    assert len(found) == len(other)
    assert identity(base) not in found
    assert identity(load("quickstart", overrides=["train.seed=1"]), seed=False) == identity(base, seed=False)


MISTAKES = [
    ("seeds = []", ["study.toml:1, seeds: expected at least 1 items"]),
    ('spec = "s.toml"\nseed = [1]', ["unknown key 'seed'. Did you mean 'seeds'"]),
    ('name = "x"', ["'spec' is missing. Name the base spec"]),
    ('spec = "quickstrat"', ["no such spec file", "Did you mean 'quickstart'"]),
    ('spec = "s.toml"\n[grid]\ntrain.batch = 3', ["grid.train.batch: expected an array of values"]),
    ('spec = "s.toml"\n[grid]\ntrain.batsh = [3]', ["batsh=3", "unknown key 'batsh'. Did you mean 'batch'"]),
    ('spec = "s.toml"\nbaseline = "whole"\n[[variant]]\nname = "hole"', ["baseline: there is no row 'whole'. Did you mean 'hole'?"]),
    ('spec = "s.toml"\n[[variant]]\nname = "hole"\nbaseline = "whole"', ["baseline: there is no row 'whole'. Did you mean 'hole'?"]),
    (
        'spec = "s.toml"\n[[variant]]\nname = "a"\n[[published]]\nvariant = "a"\nagainst = "b"\nfigure = "time"\nvalue = ""\nsource = ""',
        ["published: there is no row 'b'. There are a"],
    ),
    ('spec = "s.toml"\n[[variant]]\nname = "a"\n[[variant]]\nname = "a"', ["two variants are called 'a'"]),
    ('spec = "s.toml"\n[[variant]]\nname = "a"\n[[variant]]\nname = "b"', ["'a' and 'b' are the same run (seed 0)"]),
    ('spec = "s.toml"\n[grid]\ntrain.seed = [0, 1]', ["seed=0: train.seed is of each run of a study", "seeds = [0, 1]"]),
    ('spec = "s.toml"\nset.train.seed = 4', ["train.seed is of each run of a study"]),
    ('spec = "s.toml"\nseeds = [1, 1]', ["are the same run (seed 1)"]),
    ("spec = ", ["study.toml:1", "not TOML"]),
]


@pytest.mark.parametrize(("text", "parts"), MISTAKES, ids=[parts[-1][:40] for _, parts in MISTAKES])
def test_mistakes_are_told(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        runs(tmp_path, text)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", installed())
def test_the_installed_studies_are_sound(name: str) -> None:
    study, path = read_study(name)
    found = members(study, path)
    assert study.name
    assert all(member.baseline for member in found), "each row has a baseline, or is one"
    assert len(found) == len(study.variants) * len(study.seeds)
    for member in found:
        if len(member.spec.passes) > 1 and member.seed == found[0].seed:
            plan = compile_phase(prepare(None, member.spec, compare=False), verify="fast", costs=False, weights=False)
            plan.check_phases(member.spec.train.epochs)  # passes that do not go together


DEPTHS = ["VGG-11", "VGG-13", "VGG-16", "VGG-19", "ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101", "ResNet-152"]
SWIN = {
    "cifar10": ["accuracy", "points", "memory"],
    "cifar100": ["accuracy", "points", "memory"],
    "stl10": ["accuracy", "points", "memory"],
}
#: what each of the four systems has published, by study: rows and figures
PUBLISHED: dict[str, tuple[list[str], list[str]]] = {
    "infopro-resnet110": (["end-to-end", "checkpointing", "K = 2", "K = 3", "K = 4"], ["error", "memory", "time", "FLOPs"]),
    **{f"swin-{data}": (["end-to-end", "InfoPro", "features"], figures) for data, figures in SWIN.items()},
    "swin-svhn": (["features"], ["points", "memory"]),
    "swin-decoders": (["K = 2, features, linear", "K = 4, features, linear"], ["memory"]),
    "replacement-resnet32": (["k = 2", "k = 4"], ["parameters"]),
    "replacement-resnet110": (["k = 2", "k = 3", "k = 4"], ["parameters"]),
    "replacement-vit-b": (["k = 2", "k = 4"], ["parameters"]),
    "drop-cifar10": ([f"{depth}, dropped" for depth in DEPTHS], ["forward FLOPs", "points", "time"]),
    "drop-mnist": ([f"{depth}, dropped" for depth in DEPTHS], ["points", "time"]),
    "drop-imagenette": ([f"{depth}, dropped" for depth in DEPTHS], ["points", "time"]),
}


def test_every_published_row_is_in_an_installed_study() -> None:
    for name, (rows, figures) in PUBLISHED.items():
        study, _ = read_study(name)
        assert {row for item in study.published for row in item.variant} >= set(rows), name
        assert {item.figure for item in study.published} == set(figures), name
    assert {name for name in installed() if read_study(name)[0].published} == {f"studies/{name}" for name in PUBLISHED}


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(SpecError, match=r"no installed study of that name\. Did you mean 'studies/share-digits'"):
        read_study("studies/share-digit")
    assert read_study("share-digits") == read_study("studies/share-digits")
