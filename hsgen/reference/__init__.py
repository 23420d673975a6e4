"""The meaning of a spec: (Spec, tensors) -> outputs in plain PyTorch, sequence after sequence.

Dense masks, no tiles, no online softmax; differentiable, in float64 if you like.  Knows nothing
of graphs, plans or kernels: all else is an optimisation of this file and is tested against it.

Shapes, for one sequence: T query rows, S keys, N entries of a level, Hq query heads, Hkv key heads,
G = Hq / Hkv, Hs heads that select (Hq, Hkv or 1), D and Dv head sizes.

    inputs     which tensors there are
    choice     the order of entries, and who is kept
    partitions entries that tokens are assigned to, and anchors
    searches   entries that every query searches anew
    rows       what is known while a sequence is computed
    permutes   orders of tokens
    layouts    where entries lie
    entries    which entries there are, and who sees them
    grids      tokens along axes, and windows there
    pools      one vector an entry
    codes      product quantisation
    scores     what entries are ordered by
    deltas     keys as thresholded changes
    attention  softmax over branches, and their combination
    routes     which way each head takes
    reuse      what calls hand on
    losses     what a call tells a training besides
    sequence   one sequence
    calls      batches and packed sequences
"""

from __future__ import annotations

from hsgen.reference.calls import reference
from hsgen.reference.choice import choose, masses, order, share_of
from hsgen.reference.inputs import tensor_kinds, tensor_shapes
from hsgen.reference.reuse import Kept
from hsgen.reference.sequence import Result

__all__ = [
    "Kept",
    "Result",
    "choose",
    "masses",
    "order",
    "share_of",
    "reference",
    "tensor_kinds",
    "tensor_shapes",
]
