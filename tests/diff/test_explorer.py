"""What is written for Model Explorer, held against the fields that its formats document (names as in its TypeScript interfaces)."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.diff import Diff
from graphopt.diff.render.explorer import to_model_explorer, to_node_data, to_sync_navigation
from tests.diff.passes import Blend, Ice, Part, Skip
from tests.diff.plans import plan
from tests.support.backbones import Small

#: interface -> field -> (type, whether it must be there)
FIELDS: dict[str, dict[str, tuple[Any, bool]]] = {
    "GraphCollection": {"label": (str, True), "graphs": (list, True), "graphSorting": (str, False)},
    "Graph": {"id": (str, True), "nodes": (list, True)},
    "GraphNode": {
        "id": (str, True),
        "label": (str, True),
        "namespace": (str, True),
        "attrs": (list, False),
        "incomingEdges": (list, False),
        "outputsMetadata": (list, False),
    },
    "IncomingEdge": {"sourceNodeId": (str, True), "sourceNodeOutputId": (str, True), "targetNodeInputId": (str, True)},
    "KeyValue": {"key": (str, True), "value": (str, True)},
    "MetadataItem": {"id": (str, True), "attrs": (list, True)},
    "NodeDataProviderGraphData": {"name": (str, False), "results": (dict, True)},
    "NodeDataProviderResultData": {"value": (str, True), "bgColor": (str, False)},
    "SyncNavigationData": {
        "type": (str, True),
        "mappingEntries": (list, False),
        "disableMappingFallback": (bool, False),
        "showDiffHighlights": (bool, False),
        "relatedNodesBorderColor": (str, False),
        "relatedNodesBorderWidth": (int, False),
        "deletedNodesBorderColor": (str, False),
        "deletedNodesBorderWidth": (int, False),
        "newNodesBorderColor": (str, False),
        "newNodesBorderWidth": (int, False),
    },
    "SyncNavigationMappingEntry": {"leftNodeIds": (list, True), "rightNodeIds": (list, True)},
}


def check(interface: str, value: dict[str, Any]) -> None:
    known = FIELDS[interface]
    assert value.keys() <= known.keys(), interface
    assert {name for name, (_, needed) in known.items() if needed} <= value.keys(), interface
    assert all(isinstance(value[name], known[name][0]) for name in value), interface


DIFFS = {
    "a plan": lambda: Diff.of(plan(Ice(select=("stem", "blocks.0")), Blend(select="blocks.1"), Part(select="blocks.2"))),
    "two plans": lambda: Diff.of(plan(Skip(select="blocks.2")), plan(Ice(select="stem"))),
    "two backbones": lambda: Diff.of(plan(), plan(model=Small(blocks=6, width=16))),
}


@pytest.mark.parametrize("name", DIFFS)
def test_every_field_is_one_that_the_formats_have(name: str) -> None:
    found = DIFFS[name]()
    collection = to_model_explorer(found)
    check("GraphCollection", collection)
    assert collection["graphSorting"] in ("node_count_asc", "node_count_desc", "name_asc", "name_desc")
    assert [graph["id"] for graph in collection["graphs"]] == ["diff", "before", "after"]
    for graph in collection["graphs"]:
        check("Graph", graph)
        ids = [node["id"] for node in graph["nodes"]]
        assert len(ids) == len(set(ids))
        for node in graph["nodes"]:
            check("GraphNode", node)
            assert node["namespace"], "no node lies loose at the top level"
            for output in node.get("outputsMetadata", ()):
                check("MetadataItem", output)
            for pair in (*node["attrs"], *(pair for output in node.get("outputsMetadata", ()) for pair in output["attrs"])):
                check("KeyValue", pair)
            for edge in node["incomingEdges"]:
                check("IncomingEdge", edge)
                assert edge["sourceNodeId"] in ids
    data = to_node_data(found)
    assert data.keys() == {"diff", "before", "after"}
    for graph in collection["graphs"]:
        check("NodeDataProviderGraphData", data[graph["id"]])
        assert data[graph["id"]]["results"].keys() == {node["id"] for node in graph["nodes"]}
        for result in data[graph["id"]]["results"].values():
            check("NodeDataProviderResultData", result)


@pytest.mark.parametrize("name", DIFFS)
def test_the_mapping_is_between_nodes_of_both_and_has_each_once(name: str) -> None:
    found = DIFFS[name]()
    sync = to_sync_navigation(found)
    check("SyncNavigationData", sync)
    assert sync["type"] == "sync_navigation"
    for entry in sync["mappingEntries"]:
        check("SyncNavigationMappingEntry", entry)
    ids = nodes_and_layers(found)
    for side, graph in (("leftNodeIds", "before"), ("rightNodeIds", "after")):
        mapped = [name for entry in sync["mappingEntries"] for name in entry[side]]
        assert len(mapped) == len(set(mapped))
        assert set(mapped) <= ids[graph]


def nodes_and_layers(found: Diff) -> dict[str, set[str]]:
    """Per graph, the identifiers of its nodes, and those that Model Explorer gives its layers."""
    spaces = {graph["id"]: {node["namespace"] for node in graph["nodes"]} for graph in to_model_explorer(found)["graphs"]}
    layers = {name: {f"{space[:end]}___group___" for space in of for end in ends(space)} for name, of in spaces.items()}
    return {graph["id"]: {node["id"] for node in graph["nodes"]} | layers[graph["id"]] for graph in to_model_explorer(found)["graphs"]}


def ends(space: str) -> list[int]:
    return [place for place, character in enumerate(f"{space}/") if character == "/"]


def highlighted(found: Diff) -> tuple[set[str], set[str]]:
    """The nodes that get a border on the left and on the right: those without a match, as the mapping has no fallback."""
    entries = to_sync_navigation(found)["mappingEntries"]
    ids = nodes_and_layers(found)
    left, right = ({name for entry in entries for name in entry[side]} for side in ("leftNodeIds", "rightNodeIds"))
    return ids["before"] - left, ids["after"] - right


def test_what_a_pass_took_out_and_put_in_is_highlighted() -> None:
    gone, new = highlighted(Diff.of(plan(Blend(select="blocks.1"))))
    layers = {f"blocks/1/{name}___group___" for name in ("conv1", "conv2")}
    assert gone - layers == {"blocks_1_conv1", "blocks_1_conv2"}
    assert len({name for name in new if not name.endswith("___group___")}) == 12
    assert not {"blocks___group___", "blocks/1___group___", "blocks/0/conv1___group___"} & (gone | new)
    gone, new = highlighted(Diff.of(plan(Skip(select="blocks.2")), plan(Ice(select="stem"))))
    assert not gone
    assert {name[:9] for name in new if name.startswith("blocks_")} == {"blocks_2_"}


def test_of_two_backbones_the_blocks_of_one_are_highlighted() -> None:
    gone, new = highlighted(Diff.of(plan(), plan(model=Small(blocks=6))))
    assert not gone
    assert {name[:8] for name in new if name.startswith("blocks_")} == {"blocks_4", "blocks_5"}
    assert {name[:8] for name in new if name.startswith("blocks/")} == {"blocks/4", "blocks/5"}


def test_colours_are_those_of_the_diff_in_every_graph() -> None:
    data = to_node_data(DIFFS["a plan"]())
    assert {data[graph]["results"]["stem"]["value"] for graph in data} == {"❄ frozen"}
    assert "aux.0" in data["after"]["results"]
    assert "aux.0" not in data["before"]["results"]
