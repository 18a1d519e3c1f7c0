from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from graphopt import RunError, files
from graphopt.files import exclusive, link_atomically, lock_folder, read_text, sealed, unsealed, write_atomically, write_folder


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"first")

    def breaks(file: Any) -> None:
        file.write(b"half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_atomically(target, breaks)
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="file: could not be written: no space left on device"):
        write_atomically(tmp_path / "file", b"x")
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="pipe: is a pipe or a device, not a file"):
        write_atomically(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("links", [True, False])
def test_a_link_keeps_its_content_when_the_source_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def impossible(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", impossible)
    source, target = tmp_path / "source", tmp_path / "target"
    for text in ("first", "second"):
        write_atomically(source, text)
        link_atomically(source, target)
        assert target.read_text() == text
    write_atomically(source, "third")
    assert target.read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_a_folder_appears_whole_and_what_is_not_written_again_goes(tmp_path: Path) -> None:
    folder, allowed = tmp_path / "a" / "out", {"one", "two", "three"}
    write_folder(folder, {"one": "1", "two": "2"}, allowed)
    write_folder(folder, {"one": "!", "three": "3"}, allowed)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"one": "!", "three": "3"}
    assert os.listdir(folder.parent) == ["out"]


def test_a_folder_without_room_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="out: could not be written: no space left on device"):
        write_folder(tmp_path / "out", {"one": "1"}, {"one"})
    assert not list(tmp_path.iterdir())


def test_a_folder_has_one_owner_and_no_file_for_it(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    assert lock is not None
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    os.close(lock)
    again = lock_folder(tmp_path)
    assert again is not None
    os.close(again)
    assert not list(tmp_path.iterdir())


def test_a_lock_file_is_gone_afterwards(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_lock_file_holds_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, inside, leave, third = (threading.Event() for _ in range(4))
    flock = files.fcntl.flock

    def announced(descriptor: int, kind: int) -> None:
        if threading.current_thread() is second:
            waiting.set()
        flock(descriptor, kind)

    def hold() -> None:
        with exclusive(tmp_path / "lock"):
            inside.set()
            leave.wait(10)

    def enter() -> None:
        with exclusive(tmp_path / "lock"):
            third.set()

    monkeypatch.setattr(files.fcntl, "flock", announced)
    second, last = threading.Thread(target=hold), threading.Thread(target=enter)
    with exclusive(tmp_path / "lock"):
        second.start()
        assert waiting.wait(10)
    assert inside.wait(10)
    last.start()
    assert not third.wait(0.1), "two hold one lock"
    leave.set()
    second.join()
    last.join()
    assert not list(tmp_path.iterdir())


def test_what_is_nested_beyond_reason_is_no_json() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        unsealed("[" * 200_000)


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize("indent", [None, 2])
def test_no_flipped_bit_of_a_sealed_object_is_taken_for_good(indent: int | None) -> None:
    record = {"kind": "step", "loss": 0.1, "why": "\u00e9", "more": [1, None]}
    text = sealed(record, indent=indent).encode()
    assert unsealed(text.decode()) == record
    for bit in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = unsealed(damaged.decode())
        except ValueError:
            continue
        assert found == record
