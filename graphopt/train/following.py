"""Weights of one rank that modules of another rank follow (`supervise` with `lookahead`): the only values that go back along a chain.

A module's running mean takes the next module's weights of a step when that step is over for itself. So the rank that trains them sends
them after each update, and the one that follows waits for them only when it has handed its output on: it may then be one step ahead of
the other, which is as much as keeps both busy.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from graphopt.compiler.parts import Part
from graphopt.runtime.body import LocalBackward
from graphopt.train.link import Inlet, Message, Outlet, Wire


def followed_weights(parts: Sequence[Part]) -> Mapping[tuple[int, int], Sequence[nn.Parameter]]:
    """By the numbers of two parts, the trainable parameters of the first that a section of the second follows."""
    owner = {id(p): number for number, part in enumerate(parts) for p in part.module.parameters() if p.requires_grad}
    found = defaultdict[tuple[int, int], dict[int, nn.Parameter]](dict)
    for number, part in enumerate(parts):
        for parameter in (p for section in _sections(part) for p in section.followed()):
            if owner.get(id(parameter), number) != number:
                found[owner[id(parameter)], number][id(parameter)] = parameter
    return {pair: tuple(parameters.values()) for pair, parameters in found.items()}


class FollowedWeights:
    """This rank's part in sending followed weights back, in one phase.

    Args:
        parts: of all stages. stage: this rank's. wire: a wire between the hosts of this rank and the one with that stage.

    Attributes:
        waited: seconds spent waiting for weights since `reset`.
    """

    def __init__(self, parts: Sequence[Part], stage: int, wire: Callable[[int], Wire]) -> None:
        self._outlets: list[tuple[Outlet, Sequence[nn.Parameter]]] = []
        self._inlets: list[tuple[Inlet, Sequence[nn.Parameter]]] = []
        for (owner, follower), parameters in sorted(followed_weights(parts).items(), key=lambda item: item[0]):
            if stage == owner:
                there = wire(follower)
                self._outlets.append((Outlet(there, there), parameters))
            elif stage == follower:
                here = wire(owner)
                self._inlets.append((Inlet(here, here, torch.device("cpu")), parameters))
        coming = {id(p) for _, parameters in self._inlets for p in parameters}
        self._waiting: list[LocalBackward] = []
        for section in _sections(parts[stage]):
            later = any(id(p) in coming for p in section.followed())
            section.follow_later(later)
            if later:
                self._waiting.append(section)
        self._owed = False  # another rank has updated weights, or is about to
        self.waited = 0.0

    @property
    def bytes(self) -> int:
        """How many this rank has sent since `reset`."""
        return sum(outlet.bytes for outlet, _ in self._outlets)

    def reset(self) -> None:
        """Begins to count seconds and bytes anew."""
        self.waited = 0.0
        for outlet, _ in self._outlets:
            outlet.reset()

    def after_step(self) -> None:
        """Sends what this rank has updated."""
        for outlet, parameters in self._outlets:
            # The next step writes into them.
            outlet.send(Message(tuple(p.detach().clone() for p in parameters)))
        self._owed = bool(self._inlets)

    def receive(self) -> None:
        """Waits for the weights of the last step, if others have updated any since; they replace those that this rank has."""
        if not self._owed:
            return
        self._owed, began = False, time.perf_counter()
        with torch.no_grad():
            for inlet, parameters in self._inlets:
                for parameter, value in zip(parameters, inlet.receive().values, strict=True):
                    parameter.copy_(value)
        self.waited += time.perf_counter() - began

    def catch_up(self) -> None:
        """After this rank has handed on a micro-batch's output, its running means take the weights of this step."""
        if self._waiting:
            self.receive()
        for section in self._waiting:
            section.catch_up()


def _sections(part: Part) -> Iterator[LocalBackward]:
    return (m for m in part.module.modules() if isinstance(m, LocalBackward))
