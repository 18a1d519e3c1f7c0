"""One-way messages between two processes: tensors of any dtype and memory format, and plain values, in order and without waiting.

A message is a length, a head, and the bytes of each large tensor as they lie in memory. The head has the flags, the layout of every
tensor, and the values of small ones. The sender goes on at once, and waits only if `DEPTH` messages are still under way; a thread of the
receiver reads as many ahead. Tensors on a GPU pass through the host's memory.
"""

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

#: messages under way on each side of a link
DEPTH = 2
#: bytes up to which a tensor travels in the head
SMALL = 4096


class Message(NamedTuple):
    """What one micro-batch sends over a link.

    Attributes:
        values: tensors and plain values. stop: the number of the signal by which the run ends after this step, or 0.
        last: whether no other message of this epoch follows.
    """

    values: tuple[Any, ...]
    stop: int = 0
    last: bool = False


class _Layout(NamedTuple):
    """A tensor without its elements, or with them where they are few."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    content: bytes | None


class Outlet:
    """The sending end of a link.

    Args:
        group: a gloo group with both processes. peer: the other one's rank. patience: how long a message may take, now.

    Attributes:
        waited: seconds spent waiting for the receiver. bytes: how many were sent.
    """

    def __init__(self, group: Any, peer: int, patience: Callable[[], timedelta]) -> None:
        self._group, self._peer, self._patience = group, peer, patience
        self._under_way: deque[list[tuple[Any, Tensor]]] = deque()
        self.waited, self.bytes = 0.0, 0

    def send(self, message: Message) -> None:
        """Sends a message; its tensors must not be written to afterwards."""
        began = time.perf_counter()
        while len(self._under_way) >= DEPTH:
            self._finish()
        self.waited += time.perf_counter() - began
        large: list[Tensor] = []
        values = [pack(value, large) for value in message.values]
        head = _bytes_of(pickle.dumps((values, message.stop, message.last)))
        tensors = [torch.tensor([len(head)]), head, *large]
        self.bytes += sum(t.nbytes for t in tensors)
        self._under_way.append([(distributed.isend(t, self._peer, group=self._group), t) for t in tensors])

    def flush(self) -> None:
        """Waits until all messages have been taken."""
        began = time.perf_counter()
        while self._under_way:
            self._finish()
        self.waited += time.perf_counter() - began

    def _finish(self) -> None:
        for work, _ in self._under_way[0]:
            work.wait(self._patience())
        self._under_way.popleft()


class Inlet:
    """The receiving end of a link; arguments as for `Outlet`.

    Attributes:
        waited: seconds spent waiting for the sender. bytes: how many were received.
    """

    def __init__(self, group: Any, peer: int, patience: Callable[[], timedelta], device: torch.device) -> None:
        self._group, self._peer, self._patience, self._device = group, peer, patience, device
        self.waited, self.bytes = 0.0, 0

    def messages(self) -> Iterator[Message]:
        """The messages up to the one that is the last of its epoch; a thread receives the next ones meanwhile."""
        # One message is being received, the others lie here.
        ahead: queue.Queue[Message | BaseException] = queue.Queue(DEPTH - 1)
        threading.Thread(target=self._receive_all, args=(ahead,), name="link", daemon=True).start()
        last = False
        while not last:
            began = time.perf_counter()
            message = ahead.get()
            self.waited += time.perf_counter() - began
            if isinstance(message, BaseException):
                raise message
            last = message.last
            yield message

    def _receive_all(self, ahead: "queue.Queue[Message | BaseException]") -> None:
        try:
            message = None
            while message is None or not message.last:
                message = self._receive()
                ahead.put(message)
        except BaseException as error:
            ahead.put(error)

    def _receive(self) -> Message:
        length = self._take(torch.empty(1, dtype=torch.int64))
        head = self._take(torch.empty(int(length), dtype=torch.uint8))
        values, stop, last = pickle.loads(head.numpy().tobytes())
        values = (unpack(value, self._take) for value in values)
        return Message(tuple(v.to(self._device) if isinstance(v, Tensor) else v for v in values), stop, last)

    def _take(self, into: Tensor) -> Tensor:
        work: Any = distributed.irecv(into, self._peer, group=self._group)
        work.wait(self._patience())
        self.bytes += into.nbytes
        return into


def pack(value: Any, large: list[Tensor]) -> Any:
    """A plain value itself, of a tensor the layout; the elements of a large one are added to `large`, as bytes."""
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach().cpu()
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    content = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    small = content.numel() <= SMALL
    if not small:
        large.append(content)
    return _Layout(tensor.dtype, tuple(tensor.shape), tensor.stride(), content.numpy().tobytes() if small else None)


def unpack(value: Any, fill: Callable[[Tensor], object]) -> Any:
    """The inverse of `pack`: `fill` writes the elements of a large tensor, as bytes, into what it is given."""
    if not isinstance(value, _Layout):
        return value
    elements = torch.empty(torch.Size(value.shape).numel(), dtype=value.dtype)
    content = elements.view(torch.uint8)
    if value.content is None:
        fill(content)
    else:
        content.copy_(_bytes_of(value.content))
    return elements.as_strided(value.shape, value.stride)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in memory, without gaps or repetitions, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _bytes_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
