"""Sizes as people write them."""

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.units import Size, exact_size, parse_size, show_count, show_size, show_time


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8G", 8 * 2**30),
        ("512 MB", 512 * 10**6),
        ("512mib", 512 * 2**20),
        ("1.5 KiB", 1536),
        (".5k", 512),
        ("1_000 B", 1000),
        ("7", 7),
        ("3 bytes", 3),
        ("0", 0),
        (1024, 1024),
        (2e9, 2 * 10**9),
        ("16 EiB", 2**64),
        # Beyond what a float holds exactly.
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_parse_size(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 GiBs", "8 XB", "-1", -1, 1.5, True, None, "1e9", float("nan"), "17 EiB", [1]])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_size(text)


@given(st.integers(0, 2**64))
def test_exact_size_reads_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (8 * 2**30, "8 GiB"), (512 * 10**6, "512 MB"), (1001, "1001 B"), (1536, "1536 B")])
def test_exact_size_is_short(size: int, text: str) -> None:
    assert exact_size(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1.31 * 2**30, "1.31 GiB"), (164 * 2**20, "164 MiB"), (-3.2 * 2**20, "-3.20 MiB")],
)
def test_show_size(size: float, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize(("count", "text"), [(9999, "9,999"), (1_730_714, "1.73 M"), (23e9, "23.0 G"), (999_999, "1.00 M"), (-5, "-5")])
def test_show_count(count: float, text: str) -> None:
    assert show_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.312, "0.31 s"), (119, "119 s"), (120, "2.00 min"), (7200, "2.00 h"), (172_800, "2.00 days"), (1e7, "116 days")]
)
def test_show_time(seconds: float, text: str) -> None:
    assert show_time(seconds) == text


def test_a_field_reads_and_writes_people_s_form() -> None:
    class Cache(pydantic.BaseModel):
        limit: Size

    cache = Cache.model_validate({"limit": "8 GiB"})
    assert cache.limit == 8 * 2**30
    assert cache.model_dump(mode="json") == {"limit": "8 GiB"}
    assert Cache.model_json_schema()["properties"]["limit"]["type"] == ["string", "integer"]
    with pytest.raises(pydantic.ValidationError, match="8 GiB"):
        Cache.model_validate({"limit": "many"})
