"""What other tools read: DOT, Model Explorer's graph collections, torch's structured trace."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping

import pytest
from tests.compiler.debug.stages import collective, node, stage_of
from tests.compiler.recorded import recorded_run

from rolemesh.compiler.debug.export.dot import dot_text
from rolemesh.compiler.debug.export.model_explorer import graph_collection
from rolemesh.compiler.debug.export.torch_trace import trace_text
from rolemesh.compiler.debug.show.select import Filters, modules_of, select
from rolemesh.compiler.dump.reader import Run, Stage

pytestmark = pytest.mark.xdist_group("recorded")

TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|->|[\[\]{};=,]|[A-Za-z_#][\w.]*|\d+(?:\.\d+)?)')


def tokens(text: str) -> Iterator[str]:
    place = 0
    while text[place:].strip():
        found = TOKEN.match(text, place)
        assert found, f"no DOT from {text[place : place + 40]!r}"
        place = found.end()
        yield found[1]


def parsed(text: str) -> tuple[dict[str, tuple[str, ...]], set[tuple[str, str]], dict[str, str]]:
    """The clusters around each node, the edges, and each node's attributes.

    Reads the grammar of graphviz.org/doc/info/lang.html, as far as it is used.
    """
    clusters: dict[str, tuple[str, ...]] = {}
    edges: set[tuple[str, str]] = set()
    attributes: dict[str, str] = {}
    found = list(tokens(text))
    assert found[0] == "digraph"
    assert found[2] == "{"
    place, around = 3, ("",)
    while around:
        token = found[place]
        end = found.index(";", place) if ";" in found[place:] else len(found)
        if token == "}":
            around, place = around[:-1], place + 1
        elif token == "subgraph":
            assert found[place + 1].startswith('"cluster')
            assert found[place + 2 : place + 5] == ["{", "label", "="]
            around, place = (*around, json.loads(found[place + 5])), place + 7
        elif found[place + 1] == "->":
            assert end == place + 3
            edges.add((json.loads(token), json.loads(found[place + 2])))
            place = end + 1
        else:
            assert found[place + 1] == "["
            assert found[end - 1] == "]"
            if token.startswith('"'):
                clusters[json.loads(token)] = around[1:]
                attributes[json.loads(token)] = " ".join(found[place + 2 : end - 1])
            place = end + 1
    assert place == len(found)
    return clusters, edges, attributes


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded_run("hf:llama", "pd_mixed")


@pytest.fixture(scope="module")
def stage(run: Run) -> Stage:
    return run.program("decode").stage("partition")


def test_dot_has_all_nodes_in_their_modules_and_all_edges(stage: Stage) -> None:
    clusters, edges, attributes = parsed(dot_text(stage, list(stage.nodes.values())))
    assert set(clusters) == set(stage.nodes)
    modules = modules_of(stage)
    for name, around in clusters.items():
        assert (around[-1] if around else "") == modules[name]
    assert edges == {(x, n.name) for n in stage.nodes.values() for x in n.operands}
    coloured = {name for name, text in attributes.items() if "#f6b26b" in text}
    moving = {n.name for n in stage.nodes.values() if n.collective is not None}
    assert coloured == moving
    assert moving
    for name in moving:
        assert stage.nodes[name].kinds[0] in attributes[name]


def test_dot_of_one_module_shows_what_it_reads_as_dashed(stage: Stage) -> None:
    nodes = select(stage, Filters(modules=("model.layers.1.mlp",)))
    clusters, edges, attributes = parsed(dot_text(stage, nodes))
    inside = {node.name for node in nodes}
    dashed = {name for name, text in attributes.items() if "dashed" in text}
    assert dashed
    assert set(clusters) == inside | dashed
    assert not inside & dashed
    assert {a for a, b in edges} - inside == dashed


def test_dot_quotes_what_has_a_meaning_in_dot() -> None:
    odd = stage_of([node('a"b', "input"), node("c\\n", "x.y", 'a"b', module='m."q"')])
    clusters, edges, _ = parsed(dot_text(odd, list(odd.nodes.values())))
    assert set(clusters) == {'a"b', "c\\n"}
    assert edges == {('a"b', "c\\n")}
    assert clusters["c\\n"] == ("m", 'm."q"')


def pairs(entries: object) -> dict[str, str]:
    assert isinstance(entries, list)
    found = {entry["key"]: entry["value"] for entry in entries}
    assert all(set(entry) == {"key", "value"} for entry in entries)
    assert all(isinstance(value, str) for value in found.values())
    return found


# The keys of GraphNode, IncomingEdge and MetadataItem in Model Explorer's types.py that are used.
NODE = {"id", "label", "namespace", "attrs", "incomingEdges", "inputsMetadata", "outputsMetadata"}
EDGE = {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}


def graphs_of(collection: Mapping[str, object]) -> list[Mapping[str, list[dict[str, object]]]]:
    assert set(collection) == {"label", "graphs", "graphSorting"}
    graphs = json.loads(json.dumps(collection))["graphs"]
    assert all(set(graph) == {"id", "nodes", "groupNodeAttributes"} for graph in graphs)
    return graphs


def test_model_explorer(stage: Stage) -> None:
    (graph,) = graphs_of(graph_collection("run", [(stage, list(stage.nodes.values()))]))
    assert graph["id"] == f"pd_mixed/decode {stage.number:03}_partition"
    ids = [str(entry["id"]) for entry in graph["nodes"]]
    assert ids == list(stage.nodes)
    modules = modules_of(stage)
    for entry in graph["nodes"]:
        found = stage.nodes[str(entry["id"])]
        assert set(entry) - {"style"} == NODE
        assert entry["namespace"] == modules[found.name].replace(".", "/")
        edges = entry["incomingEdges"]
        assert isinstance(edges, list)
        assert [edge["sourceNodeId"] for edge in edges] == list(found.operands)
        assert [edge["targetNodeInputId"] for edge in edges] == [str(i) for i in range(len(edges))]
        assert all(set(edge) == EDGE for edge in edges)
        assert ("style" in entry) == (found.collective is not None)
        assert pairs(entry["attrs"])["op"] == found.op
        outputs = entry["outputsMetadata"]
        assert isinstance(outputs, list)
        assert [pairs(item["attrs"])["tensor_shape"] for item in outputs] == list(found.kinds)
        assert [item["id"] for item in outputs] == [str(i) for i in range(len(found.kinds))]


def test_model_explorer_counts_each_module_with_what_is_in_it(stage: Stage) -> None:
    (graph,) = graphs_of(graph_collection("run", [(stage, list(stage.nodes.values()))]))
    groups: Mapping[str, Mapping[str, str]] = graph["groupNodeAttributes"]  # type: ignore[assignment]
    nodes = stage.nodes.values()
    modules = modules_of(stage)
    spaces = {
        "/".join(m.split(".")[: n + 1]) for m in modules.values() for n in range(m.count(".") + 1)
    }
    assert set(groups) - {"", "(root)"} == spaces - {""}
    layer = [n for n in nodes if f"{modules[n.name]}.".startswith("model.layers.1.")]
    assert groups["model/layers/1"]["ops"] == str(sum(n.op != "input" for n in layer))
    moved = sum(n.collective["bytes"] for n in layer if n.collective)
    assert groups["model/layers/1"]["bytes received"] == str(moved)
    assert moved > 0
    assert groups[""] == {"stage": "partition", "mesh": "tp=4"}


def test_model_explorer_knows_which_result_is_read() -> None:
    several = stage_of(
        [
            node("x", "input"),
            node("split", "aten.split.Tensor", "x", kinds=["f32[2]", "f32[3]"]),
            {
                "name": "second",
                "op": "getitem",
                "args": [{"node": "split"}, 1],
                "kinds": ["f32[3]"],
            },
        ]
    )
    (graph,) = graphs_of(graph_collection("run", [(several, list(several.nodes.values()))]))
    (edge,) = graph["nodes"][2]["incomingEdges"]  # type: ignore[misc]
    assert edge == {
        "sourceNodeId": "split", "sourceNodeOutputId": "1", "targetNodeInputId": "0"
    }  # fmt: skip


# What tlparse looks for at the start of a record.
GLOG = re.compile(r"[VIWEC]\d{4} \d\d:\d\d:\d\d\.\d{6} \d+ [^:]+:\d+\] (\{.*\})$")


def records(text: str) -> list[tuple[dict[str, object], str]]:
    found: list[tuple[dict[str, object], list[str]]] = []
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("\t"):
            found[-1][1].append(line[1:])
        else:
            match = GLOG.match(line)
            assert match, line
            found.append((json.loads(match[1]), []))
    return [(metadata, "\n".join(lines)) for metadata, lines in found]


def test_trace(run: Run) -> None:
    stages = [stage for program in run.programs for stage in program.stages()]
    found = records(trace_text(stages))
    artifacts = [(m["artifact"]["name"], m["artifact"]["encoding"]) for m, _ in found]  # type: ignore[index]
    assert artifacts[:2] == [
        ("pd_mixed.prefill.000_capture", "string"),
        ("pd_mixed.prefill.000_capture", "json"),
    ]
    assert len(artifacts) == len(set(artifacts)) == 2 * len(stages)
    for (metadata, payload), encoding in zip(found, ["string", "json"] * len(stages), strict=True):
        assert metadata["has_payload"] == hashlib.md5(payload.encode()).hexdigest()
        assert metadata["artifact"]["encoding"] == encoding  # type: ignore[index]
        assert (metadata["frame_compile_id"], metadata["attempt"]) == (0, 0)
    frames = [i for i, program in enumerate(run.programs) for _ in program.stage_names * 2]
    assert [metadata["frame_id"] for metadata, _ in found] == frames
    assert found[0][1] == stages[0].text
    assert json.loads(found[1][1]) == stages[0].data


def test_a_stage_without_text_has_its_json_alone() -> None:
    bare = stage_of([node("x", "input", collective=collective("all_gather", 3))])
    bare = Stage(bare.program, bare.number, bare.name, bare.data, "")
    ((metadata, _),) = records(trace_text([bare]))
    assert metadata["artifact"] == {"name": "decode.decode.005_partition", "encoding": "json"}
