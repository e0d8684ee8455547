"""The editor's form of a graph: bypassed nodes, nested subgraphs, widgets shown on an instance."""

from typing import Any

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.editor import from_editor
from sdxl_trt.runtime.comfyui.node import Link

Json = Any


def _node(number: int, kind: str, inputs: Json = (), outputs: Json = (), **more: Any) -> Json:
    slots = [
        {"name": name, "type": of, "link": link} | ({"widget": {"name": name}} if of in ("INT", "STRING") else {})
        for name, of, link in inputs
    ]
    return {"id": number, "type": kind, "inputs": slots, "outputs": [{"type": of} for of in outputs], **more}


def _link(number: int, origin: int, slot: int, target: int, target_slot: int) -> Json:
    return {"id": number, "origin_id": origin, "origin_slot": slot, "target_id": target, "target_slot": target_slot}


def _graph(nodes: list[Json], links: list[list[Any]], *subgraphs: Json) -> Json:
    return {"nodes": nodes, "links": links, "definitions": {"subgraphs": list(subgraphs)}}


def _definition(key: str, nodes: list[Json], links: list[Json]) -> Json:
    return {"id": key, "name": f"called {key}", "inputNode": {"id": -10}, "outputNode": {"id": -20}, "nodes": nodes,
            "links": links}  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "slot", "expected"),
    [
        ([("a", "X", 1), ("b", "X", 2)], 0, Link("1", 0)),
        ([("a", "X", 1), ("b", "X", 2)], 1, Link("2", 0)),  # the input of the same number, not the first of the type
        ([("a", "Y", 1), ("b", "X", 2)], 0, Link("2", 0)),  # another type there: the first of the right type
        ([("a", "X,Y", 1), ("b", "X", 2)], 0, Link("1", 0)),
        ([("a", "*", 1)], 0, Link("1", 0)),
        ([("a", "Y", 1)], 0, None),
        ([], 0, None),
    ],
)
def test_a_bypassed_node_passes_on_an_input_of_the_right_type(inputs: Json, slot: int, expected: Link | None) -> None:
    graph = _graph(
        [
            _node(1, "A", outputs=["X"]), _node(2, "B", outputs=["X"]),
            _node(3, "Bypassed", inputs, ["X", "X"], mode=4), _node(4, "End", [("in", "X", 3)]),
        ],
        [[1, 1, 0, 3, 0, "X"], [2, 2, 0, 3, 1, "X"], [3, 3, slot, 4, 0, "X"]],
    )  # fmt: skip
    assert from_editor(graph, "x")["4"].inputs.get("in") == expected


def test_an_input_keeps_its_widget_value_if_its_link_gives_nothing() -> None:
    prompt = _node(4, "CLIPTextEncode", [("clip", "CLIP", None), ("text", "STRING", 3)], widgets_values=["its own"])
    nodes = [_node(3, "Bypassed", [("a", "INT", None)], ["STRING"], mode=4), prompt]
    assert from_editor(_graph(nodes, [[3, 3, 0, 4, 1, "STRING"]]), "x")["4"].inputs["text"] == "its own"


INNER = _definition(
    "inner",
    [_node(7, "CLIPTextEncode", [("clip", "CLIP", 11), ("text", "STRING", 12)], ["CONDITIONING"],
           widgets_values=["inner's"])],
    [_link(11, -10, 0, 7, 0), _link(12, -10, 1, 7, 1), _link(13, 7, 0, -20, 0)],
)  # fmt: skip
OUTER = _definition(
    "outer",
    [_node(8, "inner", [("clip", "CLIP", 21), ("text", "STRING", 22)], ["CONDITIONING"], widgets_values=[])],
    [_link(21, -10, 0, 8, 0), _link(22, -10, 1, 8, 1), _link(23, 8, 0, -20, 0)],
)


def _nested(instance: Json) -> Json:
    nodes = [_node(1, "CheckpointLoaderSimple", outputs=["MODEL", "CLIP", "VAE"]), instance,
             _node(9, "ConditioningZeroOut", [("conditioning", "CONDITIONING", 3)])]  # fmt: skip
    return _graph(nodes, [[1, 1, 1, 5, 0, "CLIP"], [3, 5, 0, 9, 0, "CONDITIONING"]], INNER, OUTER)


@pytest.mark.parametrize(("shown", "text"), [(["shown"], "shown"), ([], "inner's")])
def test_subgraphs_are_expanded(shown: list[str], text: str) -> None:
    instance = _node(
        5, "outer", [("clip", "CLIP", 1), ("text", "STRING", None)], ["CONDITIONING"], widgets_values=shown
    )
    found = from_editor(_nested(instance), "x")
    assert set(found) == {"1", "9", "5:8:7"}
    assert found["5:8:7"].inputs == {"clip": Link("1", 1), "text": text}
    assert found["9"].inputs == {"conditioning": Link("5:8:7", 0)}
    assert str(found["5:8:7"]) == "node 5:8:7 (CLIPTextEncode) of subgraph 'called inner'"


def test_an_ambiguous_widget_is_refused() -> None:
    instance = _node(5, "outer", [("clip", "CLIP", 1), ("text", "STRING", None)], widgets_values=["one", "another"])
    with pytest.raises(UsageError, match=r"node 5 \(subgraph 'called outer'\): its widget 'text' cannot be matched"):
        from_editor(_nested(instance), "x")


@pytest.mark.parametrize("mode", [2, 4])
def test_a_muted_or_bypassed_subgraph_has_no_nodes(mode: int) -> None:
    instance = _node(5, "outer", [("clip", "CLIP", 1)], ["CONDITIONING"], mode=mode)
    assert set(from_editor(_nested(instance), "x")) == {"1", "9"}


def test_endlessly_nested_subgraphs_are_refused() -> None:
    endless = _definition("a", [_node(1, "a")], [])
    with pytest.raises(UsageError, match="nested deeper"):
        from_editor(_graph([_node(1, "a")], [], endless), "x")
    wide = [_definition(str(level), [_node(n, str(level + 1)) for n in range(9)], []) for level in range(8)]
    with pytest.raises(UsageError, match="more than 10000 nodes"):
        from_editor(_graph([_node(1, "0")], [], *wide), "x")
