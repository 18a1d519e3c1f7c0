"""What a pass prints as a name, it reads as a name."""

import re

import pytest

import graphopt
from graphopt.errors import PassError
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from tests.passes.drop.networks import BACKBONES

NAMES = ["small", "resnet20", "vgg", "densenet", "vit", "convnext"]


@pytest.fixture(scope="module", params=NAMES)
def graph(request):
    make, input, _ = BACKBONES[request.param]
    return graphopt.trace(make(), input, compare=False)


def test_ends_of_a_prefix(graph):
    named = set()
    for path in graph.paths:
        try:
            Drop(upto=path).match(graph)
        except PassError as error:
            named |= set(re.findall(r"'([^']+)'", error.fix or ""))
    assert named
    for name in named:
        assert Drop(upto=name).match(graph).names == (name,)


def test_cuts(graph):
    with pytest.raises(PassError) as caught:
        Supervise(modules=1000).match(graph)
    shown = re.sub(r" and \d+ more$", "", caught.value.fix.partition("cuts are after ")[2]).split(", ")
    for label in shown:
        assert [cut.label for cut in Supervise(cuts=[label], decoder="none").match(graph).decision] == [label]


def test_what_stands_before_a_frozen_region(graph):
    (warning,) = (d for d in Freeze(select=graph.paths[-2]).match(graph).diagnostics if d.severity == "warning")
    named = re.search(r"frozen, but (.*) before it train", warning.message).group(1)
    for name in re.split(r", | and ", named):
        if not name.endswith(" more"):
            assert Freeze(select=name).match(graph).names
