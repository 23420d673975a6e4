"""Spec: what a sparse attention means, as a frozen value, and the only reader of its YAML text.

Plans nothing and knows nothing of kernels, GPUs or tensors.

    model    the classes, and the range of each value
    syntax   YAML text -> words with spans
    rules    what the values must be to each other
    reader   words -> Spec
    text     Spec -> YAML text
    schema   the classes -> JSON Schema, for editors
    files    paths and shipped names -> Spec
    fields   a model's config.json, field by field
    families a config.json -> a shipped spec with the model's sizes
    drafts   a shipped spec, or such a config -> the text of a new one
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
    Delta,
    Distill,
    EarlyStop,
    Force,
    Gather,
    GridWindow,
    HeadDim,
    Heads,
    HeadSpan,
    Identifier,
    Index,
    KeyPool,
    Kl,
    KMeans,
    Level,
    Loss,
    MapHow,
    Node,
    Order,
    Partition,
    Parts,
    Permute,
    Pool,
    Query,
    QueryPool,
    Reduce,
    Reuse,
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
    Tier,
    Tokens,
    TopP,
    Turn,
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
    "Delta",
    "Distill",
    "EarlyStop",
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
    "Kl",
    "Level",
    "Loss",
    "MapHow",
    "Node",
    "Order",
    "Partition",
    "Parts",
    "Permute",
    "Pool",
    "Query",
    "QueryPool",
    "Reduce",
    "Route",
    "Reuse",
    "Rotate",
    "Score",
    "ScoreForm",
    "Select",
    "Share",
    "SortInSegment",
    "Spec",
    "Static",
    "Stored",
    "Tier",
    "Tokens",
    "TopP",
    "Turn",
    "ValuePool",
    "dump",
    "load",
    "parse",
    "verify",
]
