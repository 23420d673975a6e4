"""Spec: what a sparse attention means, as a frozen value, and the only reader of its YAML text.

Plans nothing and knows nothing of kernels, GPUs or tensors.

    model    the classes, and the range of each value
    syntax   YAML text -> words with spans
    rules    what the values must be to each other
    reader   words -> Spec
    text     Spec -> YAML text
    schema   the classes -> JSON Schema, for editors
    files    paths and shipped names -> Spec
    drafts   a shipped spec -> the text of a new one
"""

from __future__ import annotations

from hsgen.spec.files import load, verify
from hsgen.spec.model import (
    Attend,
    Blocks,
    Clusters,
    Codes,
    Combine,
    Count,
    Force,
    Gather,
    GridWindow,
    HeadDim,
    Heads,
    HeadSpan,
    Identifier,
    Index,
    KeyPool,
    KMeans,
    Level,
    MapHow,
    Node,
    Order,
    Partition,
    Permute,
    Pool,
    Reduce,
    Rotate,
    Route,
    Score,
    ScoreForm,
    Select,
    Share,
    SortInSegment,
    Spec,
    Static,
    Stored,
    Tokens,
    TopP,
    ValuePool,
)
from hsgen.spec.reader import parse
from hsgen.spec.text import dump

__all__ = [
    "Attend",
    "Blocks",
    "Clusters",
    "Codes",
    "Combine",
    "Count",
    "Force",
    "GridWindow",
    "Gather",
    "HeadDim",
    "HeadSpan",
    "Heads",
    "Identifier",
    "Index",
    "KMeans",
    "KeyPool",
    "Level",
    "MapHow",
    "Node",
    "Order",
    "Partition",
    "Permute",
    "Pool",
    "Reduce",
    "Route",
    "Rotate",
    "Score",
    "ScoreForm",
    "Select",
    "Share",
    "SortInSegment",
    "Spec",
    "Static",
    "Stored",
    "Tokens",
    "TopP",
    "ValuePool",
    "dump",
    "load",
    "parse",
    "verify",
]
