"""Graphs: order, verification, inputs, text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from plan_cases import CASES

from hsgen.graph import (
    Attend,
    Graph,
    GraphError,
    Input,
    LogSumExp,
    Map,
    Meta,
    Node,
    Normalise,
    Op,
    Outputs,
    Pool,
    Reduce,
    Score,
    Select,
    TensorType,
    dump,
    op_text,
    partitions,
    result_type,
    short_last,
    tensor_inputs,
    verify,
)
from hsgen.planner import plan

BY_NAME = {spec.name: spec for spec in CASES}


def graph_of(name: str) -> Graph:
    return plan(BY_NAME[name])


def test_dump_is_aligned_and_complete() -> None:
    assert dump(graph_of("moba_group")) == (
        "graph moba_group(causal=True, Hq=4, Hkv=2, G=2, Dqk=6, Dv=5, K_block=3)\n"
        "%q = input(role=query)  : input[B, T, Hq, Dqk]\n"
        "%k = input(role=keys)   : input[B, S, Hkv, Dqk]\n"
        "%v = input(role=values) : input[B, S, Hkv, Dv]\n"
        "%block.keys      = pool(level=block, how=mean, size=8, stride=8, position=False)"
        "                                  : input[B, N_block, Hkv, Dqk] <- %k\n"
        "%block.score     = score(level=block, form=dot, scale=1.0, size=8, stride=8)"
        "                                      : f32[B, T, Hq, N_block]      <- %q, %block.keys\n"
        "%block.reduced   = reduce(share=group, how=mean)"
        "                                                                  "
        ": f32[B, T, Hkv, N_block]     <- %block.score\n"
        "%block.selection = select(level=block, size=8, stride=8, k=3, width=3, first=0, last=1,"
        " counted=True, final=True) : i32[B, T, Hkv, K_block]     <- %block.reduced\n"
        "%selected.o      = attend(branch=selected, over=blocks, scale=0.4082482904638631, size=8,"
        " stride=8)               : input[B, T, Hq, Dv]         <- %q, %k, %v, %block.selection\n"
        "%selected.lse    = log_sum_exp()"
        "                                                                                  "
        ": f32[B, Hq, T]               <- %selected.o\n"
        "return o=%selected.o, lse.selected=%selected.lse, selection.block=%block.selection\n"
    )


def test_names_are_snake_case_and_taps_are_pairs() -> None:
    assert op_text(LogSumExp()) == "log_sum_exp()"
    taps = Map(level="x", how="sum", size=4, stride=4, ratio=2, taps=((-1, 1), (0, 2)))
    assert op_text(taps).endswith("taps=[-1:1 +0:2])")


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_order_does_not_depend_on_how_the_graph_was_built(spec: object) -> None:
    graph = graph_of(spec.name)  # type: ignore[attr-defined]
    nodes = list(graph.nodes())
    for seed in range(3):
        random.Random(seed).shuffle(nodes)
        again = graph.with_nodes(nodes)
        assert again == graph
        assert dump(again) == dump(graph)
    seen: set[str] = set()
    for node in graph.nodes():
        assert seen.issuperset(node.inputs)
        seen.add(node.name)


def test_lookups() -> None:
    graph = graph_of("nsa")
    assert graph["compressed.score"].inputs == ("q", "compressed.keys")
    assert [node.name for node in graph.users("compressed.keys")] == [
        "compressed.score",
        "compressed.o",
    ]
    assert [node.name for node in graph.operands(graph["block.selection"])] == ["block.mapped"]
    assert "block.mapped" in graph and "mapped" not in graph
    with pytest.raises(GraphError, match="no node %mapped"):
        graph["mapped"]
    with pytest.raises(GraphError, match="no node %other"):
        graph.replacing(replace(graph["q"], name="other"))


def test_frozen() -> None:
    graph = graph_of("nsa")
    with pytest.raises(Exception, match="Frozen"):
        graph.digraph.add_node("x")
    with pytest.raises(TypeError):
        graph.sizes["Hq"] = 1  # type: ignore[index]


def test_sizes_follow_the_nodes() -> None:
    graph = graph_of("hisa")
    assert graph.sizes == {
        "Hq": 4, "Hkv": 2, "G": 2, "Dqk": 6, "Dv": 5, "Hi": 3, "Di": 4,
        "K_coarse": 3, "K_block": 7, "C_block": 24,
    }  # fmt: skip
    node = graph["coarse.selection"]
    assert isinstance(node.op, Select)
    wider = graph.replacing(replace(node, op=replace(node.op, k=5, width=5)))
    assert (wider.sizes["K_coarse"], wider.sizes["C_block"]) == (5, 40)


def test_partitions_and_short_entries() -> None:
    assert partitions(graph_of("nsa")) == {"compressed": (4, 2), "block": (8, 8)}
    assert short_last(graph_of("moba_not_causal"), "block")
    assert not short_last(graph_of("moba"), "block")
    assert not short_last(graph_of("nsa_not_causal"), "compressed")
    assert short_last(graph_of("nsa_not_causal"), "block")


def test_tensor_inputs_are_a_signature() -> None:
    assert [str(x) for x in tensor_inputs(graph_of("nsa"))] == [
        "q [B, T, Hq, Dqk]: queries",
        "k [B, S, Hkv, Dqk]: keys of branch selected",
        "v [B, S, Hkv, Dv]: values of branch selected",
        "k_compressed [B, S, Hkv, Dqk]: keys of level compressed",
        "k_window [B, S, Hkv, Dqk]: keys of branch window",
        "v_compressed [B, S, Hkv, Dv]: values of level compressed",
        "v_window [B, S, Hkv, Dv]: values of branch window",
        "gates [B, T, Hq, 3]: gate of each branch: compressed, selected, window",
        "compressed_key_position [Hkv, 4, Dqk]: learned pooling of level compressed",
        "compressed_key_weight [Hkv, 4, Dqk, Dqk]: learned pooling of level compressed",
        "compressed_value_position [Hkv, 4, Dv]: learned pooling of level compressed",
        "compressed_value_weight [Hkv, 4, Dv, Dv]: learned pooling of level compressed",
    ]
    assert [x.name for x in tensor_inputs(graph_of("hisa"))] == [
        "q", "k", "v", "q_index", "k_index", "w_index",
    ]  # fmt: skip


# --- verification


def test_build_refuses_what_is_no_graph() -> None:
    graph = graph_of("moba")
    nodes = graph.nodes()
    with pytest.raises(GraphError, match="%q is defined twice"):
        graph.with_nodes([*nodes, nodes[0]])
    with pytest.raises(GraphError, match="%block.keys reads %k, which is not defined"):
        graph.with_nodes(node for node in nodes if node.name != "k")
    loop = replace(graph["block.keys"], inputs=("selected.o",))
    with pytest.raises(GraphError, match="cycle: .*%block.keys"):
        graph.replacing(loop)


def test_result_types_are_inferred() -> None:
    graph = graph_of("nsa")
    for node in graph.nodes():
        if not isinstance(node.op, Input):
            assert result_type(node.op, graph.operands(node)) == node.type


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """One node of a good graph, changed for the worse, and what `verify` says."""

    graph: str
    node: str
    says: str
    op: Callable[[Op], Op] = lambda op: op
    inputs: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda inputs: inputs
    type: Callable[[TensorType], TensorType] = lambda type_: type_


BROKEN = [
    Broken(graph="nsa", node="q", says="no operands", inputs=lambda x: ("k",)),
    Broken(graph="nsa", node="compressed.keys", says="expected 3 operands", inputs=lambda x: x[:2]),
    Broken(
        graph="nsa",
        node="compressed.keys",
        says=r"expected \[Hkv, 2, Dqk, Dqk\]",
        op=lambda op: replace(op, size=2),
    ),
    Broken(
        graph="moba",
        node="block.keys",
        says="only linear",
        op=lambda op: replace(op, position=True),
    ),
    Broken(
        graph="moba", node="block.keys", says=r"expected \[B, S, ...\]", inputs=lambda x: ("q",)
    ),
    Broken(graph="moba", node="block.score", says="expected 2 operands", inputs=lambda x: x[:1]),
    Broken(
        graph="moba", node="block.score", says="keys .* level block", inputs=lambda x: ("q", "k")
    ),
    Broken(graph="moba", node="block.score", says="Dqk", inputs=lambda x: ("v", x[1])),
    Broken(
        graph="hisa", node="block.score", says="not the selection", inputs=lambda x: (*x[:3], "q")
    ),
    Broken(
        graph="hisa_blocks",
        node="block.score",
        says="entries of 3 do not nest",
        op=lambda op: replace(op, size=3, stride=3),
    ),
    Broken(
        graph="nsa", node="compressed.score_lse", says="no log-sum-exp", inputs=lambda x: ("q",)
    ),
    Broken(
        graph="nsa", node="compressed.mass", says="not a log-sum-exp", inputs=lambda x: (x[0], "q")
    ),
    Broken(graph="nsa", node="compressed.mass", says="not the score", inputs=lambda x: ("q", x[1])),
    Broken(graph="nsa", node="block.mapped", says="taps", op=lambda op: replace(op, taps=())),
    Broken(graph="nsa", node="block.mapped", says="ratio 2", op=lambda op: replace(op, ratio=2)),
    Broken(graph="nsa", node="block.mapped", says="f32", inputs=lambda x: ("q",)),
    Broken(
        graph="moba",
        node="block.selection",
        says="level other",
        op=lambda op: replace(op, level="other"),
    ),
    Broken(
        graph="moba", node="block.selection", says="width 9", op=lambda op: replace(op, width=9)
    ),
    Broken(
        graph="moba",
        node="block.selection",
        says="4 entries are forced into 3",
        op=lambda op: replace(op, last=4),
    ),
    Broken(
        graph="moba",
        node="block.selection",
        says="nothing",
        op=lambda op: replace(op, k=0, width=0),
    ),
    Broken(
        graph="moba",
        node="selected.o",
        says="not a selection of entries of 16",
        op=lambda op: replace(op, size=16, stride=16),
    ),
    Broken(graph="moba", node="selected.o", says="expected 4 operands", inputs=lambda x: x[:3]),
    Broken(
        graph="moba", node="selected.o", says="over=window", op=lambda op: replace(op, window=3)
    ),
    Broken(
        graph="moba",
        node="selected.o",
        says="tokens have size 1",
        op=lambda op: replace(op, over="tokens"),
    ),
    Broken(
        graph="moba",
        node="selected.o",
        says="differ in length",
        inputs=lambda x: ("q", "block.keys", *x[2:]),
    ),
    Broken(
        graph="nsa",
        node="compressed.o",
        says="entries of size 4, stride 2",
        op=lambda op: replace(op, size=8),
    ),
    Broken(
        graph="nsa",
        node="compressed.o",
        says="over=window",
        op=lambda op: replace(op, over="window", window=4),
    ),
    Broken(graph="nsa", node="o", says=r"expected \[B, T, Hq, 2\]", inputs=lambda x: x[:-1]),
    Broken(graph="nsa", node="o", says="at least one branch", inputs=lambda x: x[:1]),
    Broken(graph="nsa", node="o", says="branches differ", inputs=lambda x: (*x[:-1], "q")),
    Broken(graph="nsa_union", node="o", says="%q is not an attend", inputs=lambda x: ("q",)),
    Broken(
        graph="moba",
        node="block.score",
        says=r"expected f32\[B, T, Hq, N_block\], got i32",
        type=lambda type_: replace(type_, dtype="i32"),
    ),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.node}: {broken.says}")
def test_verify_refuses(broken: Broken) -> None:
    graph = graph_of(broken.graph)
    node = graph[broken.node]
    changed = replace(
        node, op=broken.op(node.op), inputs=broken.inputs(node.inputs), type=broken.type(node.type)
    )
    with pytest.raises(GraphError, match=f"%{broken.node}: .*{broken.says}|{broken.says}"):
        verify(graph.replacing(changed))


def test_verify_refuses_two_owners_and_wrong_outputs() -> None:
    graph = graph_of("moba")
    twice = graph.with_nodes([*graph.nodes(), replace(graph["selected.o"], name="again")])
    with pytest.raises(GraphError, match="branch selected more than once"):
        verify(twice)
    for outputs, says in [
        (replace(graph.outputs, o="k"), "expected"),
        (replace(graph.outputs, lse={"selected": "q"}), "not a log-sum-exp"),
        (replace(graph.outputs, selection={"block": "q"}), "not a selection"),
        (replace(graph.outputs, o="nowhere"), "no node"),
    ]:
        with pytest.raises(GraphError, match=says):
            verify(graph.with_nodes(graph.nodes(), outputs=outputs))
    sizes = dict(graph.sizes) | {"Hkv": 3}
    odd = Graph.build(graph.nodes(), outputs=graph.outputs, sizes=sizes, meta=graph.meta)
    with pytest.raises(GraphError, match="do not divide"):
        verify(odd)


def test_every_beam_head_is_seen_by_the_heads_it_serves() -> None:
    """Heads that share a selection cannot each have a beam of their own."""
    graph = graph_of("beam_of_dots")
    scored = graph["block.mass"]
    shared = Node(
        name="block.reduced",
        op=Reduce(share="all", how="sum"),
        inputs=("block.mass",),
        type=replace(scored.type, dims=("B", "T", "1", "C_block")),
    )
    selection = replace(
        graph["block.selection"],
        inputs=("block.reduced", "coarse.selection"),
        type=TensorType(dtype="i32", dims=("B", "T", "1", "K_block")),
    )
    others = [node for node in graph.nodes() if node.name != selection.name]
    with pytest.raises(GraphError, match="different beams of coarse"):
        verify(graph.with_nodes([*others, shared, selection]))


def test_heads_agree_once() -> None:
    graph = graph_of("moba_all")
    reduced = graph["block.reduced"]
    with pytest.raises(GraphError, match="already agrees"):
        result_type(reduced.op, (reduced,))


def test_a_graph_by_hand() -> None:
    """Without a spec or a planner: what a test of the emitter does."""
    q, k, v = (
        Node(name=name, op=Input(role=role), inputs=(), type=TensorType(dtype="input", dims=dims))
        for name, role, dims in (
            ("q", "query", ("B", "T", "Hq", "Dqk")),
            ("k", "keys", ("B", "S", "Hkv", "Dqk")),
            ("v", "values", ("B", "S", "Hkv", "Dv")),
        )
    )
    op = Attend(branch="near", over="window", scale=1.0, size=1, stride=1, window=4)
    o = Node(name="o", op=op, inputs=("q", "k", "v"), type=result_type(op, (q, k, v)))
    lse = Node(name="lse", op=LogSumExp(), inputs=("o",), type=result_type(LogSumExp(), (o,)))
    graph = Graph.build(
        [lse, o, v, k, q],
        outputs=Outputs(o="o", lse={"near": "lse"}, selection={}),
        sizes={"Hq": 8, "Hkv": 2, "Dqk": 64, "Dv": 64},
        meta=Meta(name="by_hand"),
    )
    assert verify(graph) is graph
    assert graph.sizes["G"] == 4
    assert str(graph).splitlines()[-1] == "return o=%o, lse.near=%lse"


def test_every_operator_is_in_the_union() -> None:
    names = {op.__name__ for op in (Pool, Score, Normalise, Reduce, Map, Select, Attend)}
    assert names <= {op.__name__ for op in Op.__args__}  # type: ignore[attr-defined]


def test_long_runs_of_taps_are_short_to_read() -> None:
    taps = tuple((i, 1) for i in range(-1, 15)) + ((20, 1), (21, 2))
    op = Map(level="x", how="sum", size=64, stride=64, ratio=16, taps=taps)
    assert op_text(op).endswith("taps=[-1..+14:1 +20:1 +21:2])")
