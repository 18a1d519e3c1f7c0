"""One-way messages between two processes: tensors of any dtype and memory format, and plain values, in order and without waiting.

A message is a head, and the bytes of its tensors as they lie in memory. The head goes from host to host, so that no process waits for its
device to read it: it has the flags and the layout of every tensor, by which the receiver has buffers ready before it takes the tensors
themselves. Those follow in one fixed order, over the wire that `Transport` names: from device to device, or through the hosts' memory.

The sender goes on at once, and waits only if `DEPTH` messages are still under way; a thread of the receiver reads as many ahead. A
message is sent only after its head, and received only after that: so what is received is always on its way, and no two processes wait for
each other.
"""

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

#: messages under way on each side of a link
DEPTH = 2
#: bytes up to which tensors travel together
SMALL = 4096
#: where each of them begins: at a multiple of so many bytes, which suits elements of any dtype
_ALIGNED = 16
_HOST = torch.device("cpu")


class Message(NamedTuple):
    """What one micro-batch sends over a link.

    Attributes:
        values: tensors and plain values. stop: the number of the signal by which the run ends after this step, or 0.
        last: whether no other message of this epoch follows.
    """

    values: tuple[Any, ...]
    stop: int = 0
    last: bool = False


class Wire:
    """Bytes between this process and another one, on one device, in the order in which they are sent.

    On CUDA, sending begins after what the current stream has to do by then, and receiving has a stream of its own, so that neither waits
    for work that it does not depend on.

    Args:
        group: one with both processes: gloo, or NCCL for a CUDA device. No other wire uses it in the other direction.
        peer: the other one's rank. patience: how long a transfer may take, now. device: where the bytes lie on both sides.

    Attributes:
        bytes: how many were sent or received.
    """

    def __init__(self, group: Any, peer: int, patience: Callable[[], timedelta], device: torch.device = _HOST) -> None:
        self._group, self._peer, self._patience, self.device = group, peer, patience, device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bytes = 0

    def send(self, content: Tensor) -> Any:
        """Begins to send bytes, which must stay as they are until `finish` has returned for what this returns."""
        self.bytes += content.nbytes
        return distributed.isend(content, self._peer, group=self._group)

    def receive(self, count: int) -> Tensor:
        """Waits for so many bytes."""
        with self._apart():
            into = torch.empty(count, dtype=torch.uint8, device=self.device)
            work = distributed.irecv(into, self._peer, group=self._group)
        self.finish(work)
        self.bytes += into.nbytes
        return into

    def finish(self, work: Any) -> None:
        """Makes the host wait until something has been sent or received; what the current stream has to do may take longer."""
        with self._apart():
            work.wait(self._patience())
        if self._stream is not None:
            self._stream.synchronize()

    def borrow(self, content: Tensor) -> None:
        """The current stream reads bytes that were received: their memory is not used again before it has."""
        if self._stream is not None:
            content.record_stream(torch.cuda.current_stream(self.device))

    def moment(self) -> Any:
        """All that the current stream has been given to do; None where work is done at once."""
        return torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None

    @staticmethod
    def wait_for(moment: Any) -> None:
        """Makes the host wait until that is done."""
        if moment is not None:
            moment.synchronize()

    def _apart(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


class _End:
    """One end of a link.

    Attributes:
        waited: seconds spent waiting for the other end.
    """

    def __init__(self, heads: Wire, tensors: Wire) -> None:
        self._heads, self._tensors = heads, tensors
        self.waited = 0.0

    @property
    def bytes(self) -> int:
        """How many went over it since `reset`."""
        return self._heads.bytes + (self._tensors.bytes if self._tensors is not self._heads else 0)

    def reset(self) -> None:
        """Begins to count seconds and bytes anew."""
        self.waited = self._heads.bytes = self._tensors.bytes = 0


class Outlet(_End):
    """The sending end of a link.

    Args:
        heads: a wire between the hosts. tensors: the wire of the tensors; `heads` itself where they pass through the hosts' memory.
    """

    def __init__(self, heads: Wire, tensors: Wire) -> None:
        super().__init__(heads, tensors)
        self._under_way: deque[list[tuple[Wire, Any, Tensor]]] = deque()

    def send(self, message: Message) -> None:
        """Sends a message; its tensors must not be written to afterwards."""
        began = time.perf_counter()
        while len(self._under_way) >= DEPTH:
            self._finish()
        self.waited += time.perf_counter() - began
        layouts, small, large = pack(message.values, self._tensors.device)
        inside = bytes(small.numpy()) if self._tensors is self._heads else None
        head = _tensor_of(pickle.dumps((layouts, small.numel(), inside, message.stop, message.last)))
        length = _tensor_of(head.numel().to_bytes(8, "little"))
        tensors = large if inside is not None or not small.numel() else [small, *large]
        sent = [(self._heads, content) for content in (length, head)] + [(self._tensors, content) for content in tensors]
        self._under_way.append([(wire, wire.send(content), content) for wire, content in sent])

    def flush(self) -> None:
        """Waits until all messages have been taken."""
        began = time.perf_counter()
        while self._under_way:
            self._finish()
        self.waited += time.perf_counter() - began

    def _finish(self) -> None:
        for wire, work, _ in self._under_way[0]:
            wire.finish(work)
        self._under_way.popleft()


class Inlet(_End):
    """The receiving end of a link; arguments as for `Outlet`, and the device on which the tensors are wanted."""

    def __init__(self, heads: Wire, tensors: Wire, device: torch.device) -> None:
        super().__init__(heads, tensors)
        self._device = device

    def messages(self) -> Iterator[Message]:
        """The messages up to the one that is the last of its epoch; a thread receives the next ones meanwhile.

        Besides the one that is being worked on, `DEPTH` are in memory: each gets its room when the work on an earlier one is done, also
        on a device that is behind its host.
        """
        ahead, done = queue.Queue[Message | BaseException](), queue.Queue[Any]()
        for _ in range(DEPTH + 1):
            done.put(None)
        threading.Thread(target=self._receive_all, args=(ahead, done), name="link", daemon=True).start()
        last = False
        while not last:
            began = time.perf_counter()
            message = ahead.get()
            self.waited += time.perf_counter() - began
            if isinstance(message, BaseException):
                raise message
            for tensor in (value for value in message.values if isinstance(value, Tensor)):
                self._tensors.borrow(tensor)
            last = message.last
            yield message
            del message
            done.put(self._tensors.moment())

    def _receive_all(self, ahead: "queue.Queue[Message | BaseException]", done: "queue.Queue[Any]") -> None:
        try:
            last = False
            while not last:
                self._tensors.wait_for(done.get())
                message = self.receive()
                last = message.last
                ahead.put(message)
                del message
        except BaseException as error:
            ahead.put(error)

    def receive(self) -> Message:
        """Waits for the next message, in this thread."""
        length = int.from_bytes(_bytes_of(self._heads.receive(8)), "little")
        layouts, size, inside, stop, last = pickle.loads(_bytes_of(self._heads.receive(length)))
        small = self._tensors.receive(size) if inside is None and size else _tensor_of(inside or b"")
        values = unpack(layouts, small, self._tensors.receive)
        return Message(tuple(v.to(self._device) if isinstance(v, Tensor) else v for v in values), stop, last)


class _Layout(NamedTuple):
    """A tensor without its elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def pack(values: Sequence[Any], device: torch.device = _HOST) -> tuple[list[Any], Tensor, list[Tensor]]:
    """Plain values as they are, with layouts in the place of tensors; the bytes of all small tensors; those of each large one."""
    layouts: list[Any] = []
    small: list[Tensor] = []
    large: list[Tensor] = []
    for value in values:
        if not isinstance(value, Tensor):
            layouts.append(value)
            continue
        tensor = value.detach().to(device)
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        layout = _Layout(tensor.dtype, tuple(tensor.shape), tensor.stride())
        content = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        layouts.append(layout)
        if layout.nbytes > SMALL:
            large.append(content)
        else:
            small += [content, content.new_zeros(_room(layout) - layout.nbytes)]
    return layouts, torch.cat(small) if small else torch.empty(0, dtype=torch.uint8, device=device), large


def unpack(layouts: Sequence[Any], small: Tensor, take: Callable[[int], Tensor]) -> list[Any]:
    """The inverse of `pack`; `take` gives the bytes of the large tensors one after the other, by their number."""
    values, at = list[Any](), 0
    for layout in layouts:
        if not isinstance(layout, _Layout):
            values.append(layout)
            continue
        if layout.nbytes > SMALL:
            content = take(layout.nbytes)
        else:
            content = small[at : at + layout.nbytes]
            at += _room(layout)
        values.append(content.view(layout.dtype).as_strided(layout.shape, layout.stride))
    return values


def _room(layout: _Layout) -> int:
    return -(-layout.nbytes // _ALIGNED) * _ALIGNED


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in memory, without gaps or repetitions, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _tensor_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _bytes_of(content: Tensor) -> bytes:
    return bytes(content.numpy())
