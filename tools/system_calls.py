"""Runs a function in a forked process and sees every system call by which it changes a folder, before the kernel does it.

A seccomp filter hands these calls to the parent, from whatever library they come; nothing is traced, and nothing else is slowed down.
Linux on x86-64 only. A process that no more than this one may do: fork (so one thread), and no accelerator in use.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: of a call: its number; where its arguments name files, as (index of a folder's descriptor, index of a path); and the bits of one
#: argument, (index, mask), without which the call changes nothing
Where = tuple[int | None, int | None]
_DESCRIPTOR, _PATH, _AT = ((0, None),), ((None, 0),), ((0, 1),)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CALLS: dict[str, tuple[int, tuple[Where, ...], tuple[int, int] | None]] = {
    "open": (2, _PATH, (1, _WRITING)),
    "creat": (85, _PATH, None),
    "openat": (257, _AT, (2, _WRITING)),
    "openat2": (437, _AT, None),
    "write": (1, _DESCRIPTOR, None),
    "pwrite64": (18, _DESCRIPTOR, None),
    "writev": (20, _DESCRIPTOR, None),
    "pwritev": (296, _DESCRIPTOR, None),
    "pwritev2": (328, _DESCRIPTOR, None),
    "sendfile": (40, _DESCRIPTOR, None),
    "splice": (275, ((2, None),), None),
    "copy_file_range": (326, ((2, None),), None),
    "mmap": (9, ((4, None),), (3, 1)),  # MAP_SHARED
    "truncate": (76, _PATH, None),
    "ftruncate": (77, _DESCRIPTOR, None),
    "fallocate": (285, _DESCRIPTOR, None),
    "fsync": (74, _DESCRIPTOR, None),
    "fdatasync": (75, _DESCRIPTOR, None),
    "flock": (73, _DESCRIPTOR, None),
    "rename": (82, ((None, 0), (None, 1)), None),
    "renameat": (264, ((0, 1), (2, 3)), None),
    "renameat2": (316, ((0, 1), (2, 3)), None),
    "link": (86, ((None, 0), (None, 1)), None),
    "linkat": (265, ((0, 1), (2, 3)), None),
    "symlink": (88, ((None, 1),), None),
    "symlinkat": (266, ((1, 2),), None),
    "unlink": (87, _PATH, None),
    "unlinkat": (263, _AT, None),
    "mkdir": (83, _PATH, None),
    "mkdirat": (258, _AT, None),
    "rmdir": (84, _PATH, None),
    "mknod": (133, _PATH, None),
    "mknodat": (259, _AT, None),
    "chmod": (90, _PATH, None),
    "fchmod": (91, _DESCRIPTOR, None),
    "fchmodat": (268, _AT, None),
    "fchmodat2": (452, _AT, None),
    "chown": (92, _PATH, None),
    "fchown": (93, _DESCRIPTOR, None),
    "fchownat": (260, _AT, None),
    "utime": (132, _PATH, None),
    "utimes": (235, _PATH, None),
    "futimesat": (261, _AT, None),
    "utimensat": (280, _AT, None),
    "setxattr": (188, _PATH, None),
    "fsetxattr": (190, _DESCRIPTOR, None),
    "io_uring_setup": (425, (), None),  # would change files unseen: named wherever it is called
}
NAMES = {number: name for name, (number, _, _) in CALLS.items()}

_ARCHITECTURE = 0xC000003E
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_SECCOMP, _NEW_LISTENER, _NO_NEW_PRIVILEGES, _CONTINUE = 317, 8, 38, 1
_AT_CWD = -100


def available() -> bool:
    """Whether this system can do it."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and os.path.exists("/proc/self/mem")


@dataclass(frozen=True)
class Call:
    """A system call that is about to happen: its name, and the files that it names, relative to the watched folder ("" for itself)."""

    name: str
    paths: tuple[str, ...]
    process: int
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {' '.join(self.paths)}"

    def do_half(self, copy: Path | None = None) -> None:
        """Writes the first half of what `write` or `pwrite64` is about to write: a process may be killed in the middle of one.

        With `copy`, into that copy of the watched folder, if the file has not been removed.
        """
        descriptor, pointer, size, offset = self.arguments[:4]
        data = _memory(self.process, pointer, size // 2)
        if self.name == "write":
            with open(f"/proc/{self.process}/fdinfo/{descriptor}") as file:
                fields = dict(line.split(":", 1) for line in file)
            appends = int(fields["flags"], 8) & os.O_APPEND
            offset = os.stat(f"/proc/{self.process}/fd/{descriptor}").st_size if appends else int(fields["pos"])
        if copy is not None and not (copy / self.paths[0]).exists():
            return
        target = os.open(f"/proc/{self.process}/fd/{descriptor}" if copy is None else copy / self.paths[0], os.O_WRONLY)
        try:
            os.pwrite(target, data, offset)
        finally:
            os.close(target)


def watch(function: Callable[[], None], root: Path, decide: Callable[[int, Call], int]) -> int:
    """Calls `function` in a forked process; returns its status, as `os.waitpid` does.

    `decide(number, call)` is asked, from 0 on, before every call that changes something under `root`. It returns 0, or the number of a
    signal that the process gets first; after SIGKILL the call does not happen.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _child(function, ours, theirs)
    theirs.close()
    with ours:
        _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1)
    try:
        _serve(listener, child, os.path.realpath(root), decide)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(listener)
        status = os.waitpid(child, 0)[1]
    return status


def _child(function: Callable[[], None], ours: socket.socket, theirs: socket.socket) -> None:
    status = 1
    try:
        ours.close()
        listener = _install()
        socket.send_fds(theirs, [b"x"], [listener])
        os.close(listener)
        theirs.close()
        function()
        status = 0
    finally:
        os._exit(status)  # whoever forked must not go on twice


def _install() -> int:
    """Installs the filter in this thread, and returns the descriptor through which its calls are reported."""
    code: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for number, _, bits in CALLS.values():
        if bits is None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOTIFY)]
        else:
            index, mask = bits
            test = [(_LOAD, 0, 0, 16 + 8 * index), (_ANY_BIT, 0, 1, mask), (_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
            code += [(_EQUAL, 0, len(test), number), *test]
    code.append((_RETURN, 0, 0, _ALLOW))
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    listener = libc.syscall(_SECCOMP, 1, _NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "the system refuses a seccomp filter")
    return int(listener)


def _serve(listener: int, child: int, root: str, decide: Callable[[int, Call], int]) -> None:
    poll, number = select.poll(), 0
    poll.register(listener, select.POLLIN)
    while True:
        (_, event), *_ = poll.poll()
        if not event & select.POLLIN:
            return  # no process is left under the filter
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
            identity, process, _, called, _, _, *arguments = struct.unpack("QIIiIQ6Q", notice)
            call = _call(process, NAMES[called], tuple(arguments), root)
            if call is not None:
                sent = decide(number, call)
                number += 1
                if sent:
                    os.kill(child, sent)
            fcntl.ioctl(listener, _SEND, bytearray(struct.pack("QqiI", identity, 0, 0, _CONTINUE)))
        except FileNotFoundError:
            continue  # the process is gone


def _call(process: int, name: str, arguments: tuple[int, ...], root: str) -> Call | None:
    """What a process is about to do, or None if it is not done under `root`."""
    places = CALLS[name][1]
    paths = [_path(process, arguments, place) for place in places]
    inside = [path == root or path.startswith(root + "/") for path in paths]
    if places and not any(inside):
        return None
    shown = tuple(path[len(root) + 1 :] if within else path for path, within in zip(paths, inside, strict=True))
    return Call(name, shown, process, arguments)


def _path(process: int, arguments: tuple[int, ...], place: Where) -> str:
    folder, pointer = place
    base, given = f"/proc/{process}/cwd", ""
    if folder is not None and (descriptor := ctypes.c_int(arguments[folder]).value) != _AT_CWD:
        base = f"/proc/{process}/fd/{descriptor}"
    if pointer is not None and arguments[pointer]:
        given = os.fsdecode(_text(process, arguments[pointer]))
    try:
        found = given if given.startswith("/") else os.path.join(os.readlink(base), given) if given else os.readlink(base)
    except OSError:
        return ""  # no such descriptor: the call fails
    # What a link points to is changed through its name, the link itself is not followed.
    return os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))


def _text(process: int, pointer: int) -> bytes:
    """The bytes up to the first zero."""
    found = b""
    while b"\0" not in found and len(found) < 8192:
        found += _memory(process, pointer + len(found), 4096 - (pointer + len(found)) % 4096)
    return found.partition(b"\0")[0]


def _memory(process: int, pointer: int, size: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), size, pointer)
