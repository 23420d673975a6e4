"""Choices of the reference beside those of peers whose attention kernels run on a GPU only, on CPU.

    python -m benchmarks.independent_blocks --sources DIR     DIR/<repository> are checkouts of the peers

What these systems are is which blocks they choose; that part of theirs is plain PyTorch.  Scores are what
is chosen by.  Their code is read from the checkouts and is no part of this one; only figures are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.common import Json
from benchmarks.independent import kept, tensors
from benchmarks.peers import Missing, OnCPU, modules, origin
from hsgen import standins
from hsgen.reference import Result, reference
from hsgen.reference.permutes import cluster_of
from hsgen.selection import members
from hsgen.spec import Blocks, GridWindow, KMeans, Spec, Static, load


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """What one side says, row by row.

    member: bool[R, H, N].  scores: f[R, H, N], None: not handed out.  o: [T, H, D], None: not computed.
    """

    member: Tensor
    scores: Tensor | None = None
    o: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One peer beside one spec.

    Attributes:
        repository: as GitHub names it; its checkout is DIR/<last part>.
        files: the modules that are read, by path in the checkout, in order.
        stand_ins: what they import and cannot be had here, by module.
        what: what is compared, and the sizes.
        run: modules by stem -> theirs, ours.
    """

    repository: str
    files: tuple[str, ...]
    what: str
    run: Callable[[Mapping[str, ModuleType]], tuple[Chosen, Chosen]]
    stand_ins: Mapping[str, Missing]


def ours(result: Result, level: str, rows: Tensor) -> Chosen:
    """A level's choice and scores of some rows of a batch of one; what no row may choose scores 0."""
    selection = result.selection[level]
    scores = result.scores[level][0, rows]
    chosen = members(selection, scores.shape[-1])[0, rows]
    return Chosen(member=chosen, scores=scores.masked_fill(scores == -torch.inf, 0.0))


# --- XAttention


def _xattention() -> Spec:
    """Tiles of 4, blocks of 16."""
    spec = load("xattention")
    sizes = {"tile": 4, "block": 16}
    levels = []
    for level in spec.levels:
        size = sizes[level.name]
        assert level.query is not None
        query = level.query.model_copy(update={"block": size})
        partition = Blocks(size=size, stride=size)
        levels.append(level.model_copy(update={"partition": partition, "query": query}))
    return spec.model_copy(update={"levels": tuple(levels)})


def xattention(peer: Mapping[str, ModuleType]) -> tuple[Chosen, Chosen]:
    """Five chunks of 64 tokens, the last of which is padded: without padding theirs masks everything.

    In their first chunk the diagonal is written over the first column, so that the first block is not
    forced there, and one block more is taken than the mass needs: rows from the second chunk on.
    """
    spec = standins.bind(_xattention(), query=4, kv=4, dim=32)
    x = tensors(spec, 312, 6)
    q, k = (x[name].transpose(1, 2) for name in ("q", "k"))
    masses, chosen = peer["Xattention"].xattn_estimate(
        q, k, 16, 4, threshold=0.9, chunk_size=64, use_triton=False, causal=True
    )
    rows = torch.arange(64, 312, 16)
    member, scores = (x[0].transpose(0, 1)[4:] for x in (chosen, masses.double()))
    return Chosen(member=member, scores=scores), ours(reference(spec, x), "block", rows)


# --- Generalized neighborhood attention

AXES = (6, 7, 8)
# window, stride, dilation and causality along each axis
BOXES = (
    ((3, 4, 5), (1, 1, 1), (1, 1, 1), (False, False, False)),
    ((4, 4, 4), (2, 4, 3), (1, 1, 1), (False, False, False)),
    ((2, 3, 3), (2, 1, 3), (2, 1, 2), (False, False, False)),
    ((3, 3, 2), (1, 2, 2), (1, 2, 1), (True, False, True)),
    ((6, 7, 8), (6, 1, 8), (1, 1, 1), (True, True, True)),
)


def gna(peer: Mapping[str, ModuleType]) -> tuple[Chosen, Chosen]:
    """Tokens that rows see, for one box after another; theirs is what they give FlexAttention."""
    n = math.prod(AXES)
    rows, keys = torch.arange(n)[:, None], torch.arange(n)

    def whole(mask: Callable[..., Tensor], **_more: object) -> Tensor:
        return mask(torch.tensor(0), torch.tensor(0), rows, keys)

    flex = peer["flex"]
    flex.create_block_mask = whole  # type: ignore[attr-defined]
    theirs, mine = [], []
    for window, stride, dilation, causal in BOXES:
        mask = flex.get_na_flex_mask("cpu", 3, AXES, window, stride, dilation, causal)
        theirs.append(mask)
        grid = GridWindow(window=window, stride=stride, dilation=dilation, causal=causal)
        near = load("gna").attend[0].model_copy(update={"static": Static(grid=grid)})
        spec = load("gna").model_copy(update={"attend": (near,), "axes": AXES})
        small = standins.bind(spec, query=1, kv=1, dim=4)
        seen = reference(small, tensors(small, n, 7), keep_seen=True).seen["near"]
        mine.append(seen[0, :, 0])
    return Chosen(member=torch.stack(theirs, 1)), Chosen(member=torch.stack(mine, 1))


# --- MInference


def minference(peer: Mapping[str, ModuleType]) -> tuple[Chosen, Chosen]:
    """Columns and diagonals of every head, of 500 tokens; theirs are caught on the way to their kernel."""
    T, columns, slashes = 500, 60, 150
    caught: list[tuple[Tensor, Tensor]] = []

    def kernel(q: Tensor, _k: Tensor, _v: Tensor, column: Tensor, slash: Tensor) -> Tensor:
        caught.append((column.flatten(), slash.flatten()))
        return q

    module = peer["Minference"]
    module.vertical_slash_sparse_attention = kernel  # type: ignore[attr-defined]
    shipped = load("minference")
    levels = []
    for level in shipped.levels:
        budget = {"column": columns, "slash": slashes}.get(level.name)
        assert level.select is not None
        select = level.select.model_copy(update={"top_k": budget or level.select.top_k})
        levels.append(level.model_copy(update={"select": select}))
    spec = shipped.model_copy(update={"levels": tuple(levels)})
    spec = standins.bind(spec, query=4, kv=4, dim=128)  # their scale is that of 128
    x = tensors(spec, T, 8)
    x["route"] = torch.zeros_like(x["route"]).long()  # vertical and slash, all heads
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    module.Minference_prefill(q, k, v, columns, slashes)
    theirs = torch.zeros(2, 4, T, dtype=torch.bool)
    for h, (column, slash) in enumerate(caught):
        theirs[0, h, column] = theirs[1, h, slash] = True
    result = reference(spec, x)
    mine = [members(result.selection[name], T)[0, -1] for name in ("column", "slash")]
    return Chosen(member=theirs), Chosen(member=torch.stack(mine))


# --- SVG2


def svg2(peer: Mapping[str, ModuleType]) -> tuple[Chosen, Chosen]:
    """Their map and their oracle of attention by clusters; clusters are ours, on both sides."""
    T, theirs, d = 200, peer["kmeans_utils"], 16
    shipped = load("svg2")
    level = shipped.levels[0]
    assert level.permute is not None
    assert level.select is not None
    assert level.select.top_p is not None
    few = {"queries": KMeans(clusters=6, iterations=5), "keys": KMeans(clusters=20, iterations=5)}
    top_p = level.select.top_p.model_copy(update={"min": 2})
    changes = {
        "permute": level.permute.model_copy(update=few),
        "select": level.select.model_copy(update={"top_p": top_p}),
    }
    spec = shipped.model_copy(update={"levels": (level.model_copy(update=changes),)})
    spec = standins.bind(spec, query=4, kv=4, dim=d)
    x = tensors(spec, T, 9)
    sides = [("q", few["queries"]), ("k", few["keys"])]
    clusters = [cluster_of(each, x[name][0]) for name, each in sides]
    orders = [cluster.sort(dim=-1, stable=True).indices for cluster in clusters]
    sizes = [
        torch.nn.functional.one_hot(cluster, each.clusters).sum(1)
        for cluster, (_, each) in zip(clusters, sides, strict=True)
    ]
    q, k, v = (x[name][0].transpose(0, 1) for name in ("q", "k", "v"))
    means = [
        torch.zeros(4, each.clusters, d, dtype=y.dtype)
        .scatter_add_(1, cluster[..., None].expand(-1, -1, d), y)
        .div(size.clamp(min=1)[..., None])
        for (_, each), y, cluster, size in zip(sides, (q, k), clusters, sizes, strict=True)
    ]
    chosen = theirs.identify_dynamic_map(
        *(y[None] for y in means), *(y[None] for y in sizes), 0.9, 0.1
    )
    at = [order[..., None].expand(-1, -1, d) for order in orders]
    sorted_ = (q.gather(1, at[0]), k.gather(1, at[1]), v.gather(1, at[1]))
    o = theirs.dynamic_block_sparse_fwd_torch(
        *(y[None] for y in sorted_), chosen, *(y[None] for y in sizes)
    )[0]
    o = torch.zeros_like(o).scatter_(1, at[0], o).transpose(0, 1)
    rows = clusters[0][..., None].expand(-1, -1, chosen.shape[-1])
    result = reference(spec, x)
    mine = members(result.selection["cluster"], chosen.shape[-1])[0]
    there = (sizes[1] > 0)[None]  # an empty cluster is nobody's
    member = chosen[0].gather(1, rows).transpose(0, 1) & there
    return Chosen(member=member, scores=o), Chosen(member=mine & there, scores=result.o[0])


def _timer() -> ModuleType:
    """Their decorator that times, without the clock."""
    module = ModuleType("svg.timer")
    module.time_logging_decorator = lambda _words: lambda function: function  # type: ignore[attr-defined]
    return module


NATTEN = "src/natten/backends/flex.py"
COMPARISONS: dict[str, Comparison] = {
    "gna": Comparison(
        repository="SHI-Labs/NATTEN",
        files=(NATTEN,),
        what="6 x 7 x 8 tokens; five boxes with strides, dilation, causal axes",
        run=gna,
        stand_ins={
            "natten.backends.configs.checks": (
                "_FLEX_COMPILE_SUPPORTED",
                "_FLEX_SUPPORTED",
                "can_run_flex_attention",
            ),
            "natten.backends.configs.flex": (
                "check_flex_fmha_forward_config",
                "check_flex_fna_forward_config",
            ),
            "natten.token_permute": ("token_permute_operation", "token_unpermute_operation"),
            "natten.types": (
                *(f"CausalArg{n}DTypeOrDed" for n in (1, 2, 3)),
                *(f"Dimension{n}DType{end}" for n in (1, 2, 3) for end in ("", "OrDed")),
                *("CausalArgType", "CausalArgTypeOrDed", "DimensionType", "DimensionTypeOrDed"),
            ),
            "natten.utils": ("log",),
            "natten.utils.checks": (
                "check_all_args",
                "check_args_against_input",
                "check_input_size_arg",
                "fmha_tensor_checks",
                "na_tensor_checks",
                "varlen_tensor_checks",
            ),
            "natten.utils.environment": ("is_torch_compiling",),
        },
    ),
    "minference": Comparison(
        repository="mit-han-lab/x-attention",
        files=("xattn/src/Minference.py",),
        what="a copy of it; 4 heads, D 128, 60 columns, 150 diagonals; 500 tokens",
        run=minference,
        stand_ins={
            "minference.ops.pit_sparse_flash_attention_v2": ("vertical_slash_sparse_attention",)
        },
    ),
    "svg2": Comparison(
        repository="svg-project/Sparse-VideoGen",
        files=("svg/kmeans_utils.py",),
        what="4 heads, D 16, 6 and 20 clusters, 0.9 of the mass, 2 at least; 200 tokens",
        run=svg2,
        stand_ins={
            "flashinfer": (),
            "cuvs.cluster.kmeans": ("KMeansParams", "fit"),
            "svg.timer": _timer(),
        },
    ),
    "xattention": Comparison(
        repository="mit-han-lab/x-attention",
        files=("xattn/src/utils.py", "xattn/src/Xattention.py"),
        what="4 heads, D 32, tiles of 4, blocks of 16, 0.9 of the mass; 312 tokens, rows from the 65th on",
        run=xattention,
        stand_ins={
            "xattn.src.kernels": (
                "flat_group_gemm",
                "softmax_fuse_block_sum",
                "flat_group_gemm_fuse_reshape",
            ),
            "block_sparse_attn": ("block_sparse_attn_func",),
        },
    ),
}


def compare(comparison: Comparison, sources: Path) -> Json:
    """Figures of one comparison."""
    checkout, where = origin(comparison.repository, "", sources)
    read = modules(checkout, comparison.files, comparison.stand_ins)
    with OnCPU():
        theirs, mine = comparison.run(read)
    same = (theirs.member == mine.member).all(-1)
    figures: Json = {
        **where,
        "files": list(comparison.files),
        "what": comparison.what,
        "rows": same.numel(),
        "same_rows": int(same.sum()),
    }
    if theirs.scores is not None:
        assert mine.scores is not None
        figures["scores"] = float(
            (theirs.scores - mine.scores).abs().amax() / mine.scores.abs().amax()
        )
    if theirs.o is not None:
        assert mine.o is not None
        figures["outputs"] = float((theirs.o - mine.o).norm() / mine.o.norm())
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and keep the figures."""
    kept("benchmarks.independent_blocks", "blocks", COMPARISONS, compare, argv)


if __name__ == "__main__":
    main()
