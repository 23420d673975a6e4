"""The operators as small frozen classes in a closed union, and the Graph that holds them.

Knows what each value's shape is; knows neither schedules nor GPUs nor templates.

Dimensions are names: B batch, Z sequences (B, or those that are packed), T query rows, T/b blocks of
b of them, S key rows, Hq and Hkv heads, G = Hq / Hkv, Dqk and Dv head dims, Hi and Di heads and dim
of the index, N_x entries of level x, K_x slots of its selection, W_x words of it where rows are
bitmaps, C_x candidates of x inside another level's beam; a dimension that is a number is written as
one.
"""

from __future__ import annotations

from hsgen.graph.checks import befores, partitions, segments, short_last, verify
from hsgen.graph.nodes import FIXED_SIZES, Graph, GraphError, Meta, Node, Outputs, TensorType, dump
from hsgen.graph.ops import (
    Attend,
    AxisWindow,
    Carry,
    Cluster,
    Codes,
    Cut,
    Delta,
    Distance,
    Divergence,
    DType,
    Gate,
    Input,
    LogSumExp,
    Map,
    Norm,
    Normalise,
    Op,
    OutputGate,
    Pattern,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Role,
    Rotate,
    Round,
    Route,
    Score,
    Select,
    SelectSet,
    Switch,
    Tiers,
    Turns,
    Union,
    Which,
)
from hsgen.graph.rows import block_of, own_entries
from hsgen.graph.signature import TensorInput, tensor_inputs
from hsgen.graph.text import align, op_fields, op_text
from hsgen.graph.types import result_type

__all__ = [
    "Attend",
    "AxisWindow",
    "Cluster",
    "Codes",
    "Cut",
    "Delta",
    "Carry",
    "DType",
    "Distance",
    "Divergence",
    "FIXED_SIZES",
    "Gate",
    "Graph",
    "GraphError",
    "Input",
    "LogSumExp",
    "Map",
    "Meta",
    "Node",
    "Norm",
    "Normalise",
    "Op",
    "OutputGate",
    "Outputs",
    "Pattern",
    "Permute",
    "Pool",
    "PoolHeads",
    "PoolRows",
    "Recall",
    "Reduce",
    "ReduceRows",
    "Role",
    "Rotate",
    "Round",
    "Route",
    "Score",
    "Select",
    "SelectSet",
    "Switch",
    "TensorInput",
    "TensorType",
    "Tiers",
    "Turns",
    "Union",
    "Which",
    "align",
    "befores",
    "block_of",
    "dump",
    "op_fields",
    "op_text",
    "own_entries",
    "partitions",
    "result_type",
    "segments",
    "short_last",
    "tensor_inputs",
    "verify",
]
