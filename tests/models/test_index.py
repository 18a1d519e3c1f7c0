"""The index of backbones: what libraries have, kept in the cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from torchvision import models

from graphopt.models.catalog import default_input, names
from graphopt.models.index import index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    index.cache_clear()
    return tmp_path / "graphopt" / "backbones"


def test_it_has_the_names_and_inputs_of_the_libraries() -> None:
    assert names("timm") == timm.list_models()
    assert names("torchvision") == models.list_models()
    inputs = {"resnet50": 224, "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": 384, "tv_resnet50": 224}
    for name, side in inputs.items():
        assert tuple(default_input("timm", name, {}) or ()) == (3, side, side)
    assert default_input("torchvision", "inception_v3", {}) == (3, 299, 299)
    assert default_input("torchvision", "mc3_18", {}) == (3, 16, 224, 224)


def test_a_library_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = index("torchvision")
    index.cache_clear()
    monkeypatch.setattr("graphopt.models.index._torchvision", None)
    again = index("torchvision")
    assert list(map(list, again)) == list(map(list, found))
    assert {name: tuple(shape) for name, shape in again.inputs.items()} == {name: tuple(shape) for name, shape in found.inputs.items()}
    assert [file.name.partition("-")[0] for file in cache.iterdir()] == ["torchvision"]


@pytest.mark.parametrize("content", ["", "{}", "{", None])
def test_a_library_is_asked_again(content: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file is damaged, or the library's files are not those that it was made of."""
    index("torchvision")
    (file,) = cache.iterdir()
    if content is None:
        monkeypatch.setattr("graphopt.models.index.FORMAT_VERSION", 0)
    else:
        file.write_text(content)
    index.cache_clear()
    assert "resnet50" in index("torchvision").names
    assert len([*cache.iterdir()]) == (2 if content is None else 1)
    assert content is None or file.read_text() != content


def test_no_cache_folder_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "resnet50" in names("torchvision")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_model_that_the_process_has_added_is_known() -> None:
    index("timm")

    @timm.models.register_model
    def of_a_test(**arguments: object) -> object:
        return timm.create_model("resnet18", **arguments)

    assert default_input("timm", "of_a_test", {"in_chans": 1}) == (1, 224, 224)
