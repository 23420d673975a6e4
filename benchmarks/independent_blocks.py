"""Choices of the reference beside those of peers whose attention kernels run on a GPU only, on CPU.

    python -m benchmarks.independent_blocks --sources DIR     DIR/<repository> are checkouts of the peers

What these systems are is which blocks they choose; that part of theirs is plain PyTorch.  Scores are what
is chosen by.  Their code is read from the checkouts and is no part of this one; only figures are kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Json
from benchmarks.independent import OnCPU, commit, read, tensors
from hsgen import standins
from hsgen.reference import Result, reference
from hsgen.selection import members
from hsgen.spec import Blocks, GridWindow, Spec, Static, load

TOLERANCE = 1e-5  # theirs are in float32 here and there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """What one side says, row by row.  member: bool[R, H, N]; scores: f[R, H, N], None: not handed out."""

    member: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One peer beside one spec.

    Attributes:
        repository: as GitHub names it; its checkout is DIR/<last part>.
        files: the modules that are read, by path in the checkout, in order.
        stand_ins: what they import and cannot be had here, by module: names in it, which do nothing.
        what: what is compared, and the sizes.
        run: modules by stem -> theirs, ours.
    """

    repository: str
    files: tuple[str, ...]
    what: str
    run: Callable[[Mapping[str, ModuleType]], tuple[Chosen, Chosen]]
    stand_ins: Mapping[str, tuple[str, ...]]


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
    checkout = sources / comparison.repository.split("/")[1]
    modules: dict[str, ModuleType] = {}
    for file in comparison.files:
        name = file.removesuffix(".py").replace("/", ".")
        found = {name: module for name, module in modules.items() if "." in name}
        found |= {name: _empty(name, names) for name, names in comparison.stand_ins.items()}
        module = read(checkout / file, _packages([*found]) | found)
        modules |= {name: module, Path(file).stem: module}
    with OnCPU():
        theirs, mine = comparison.run(modules)
    same = (theirs.member == mine.member).all(-1)
    figures: Json = {
        "repository": comparison.repository,
        "commit": commit(checkout),
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
    return figures


def _packages(names: Sequence[str]) -> dict[str, ModuleType]:
    """The packages that modules are in, of which nothing else is had."""
    parts = [name.split(".") for name in names]
    above = {".".join(part[:n]) for part in parts for n in range(1, len(part))}
    return {name: ModuleType(name) for name in above}


def _empty(name: str, names: Sequence[str]) -> ModuleType:
    module = ModuleType(name)
    for each in names:
        setattr(module, each, MagicMock())
    return module


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.independent_blocks")
    parser.add_argument(
        "--sources", type=Path, required=True, help="folder of the peers' checkouts"
    )
    args = parser.parse_args(argv)
    result = common.provenance("benchmarks.independent_blocks", ["--sources", "DIR"], "cpu")
    found: Json = {}
    for name, each in COMPARISONS.items():
        found[name] = compare(each, args.sources)
        print(f"{name:20} {found[name]}")
        assert found[name].get("scores", 0.0) < TOLERANCE, f"{name} differs"
    result["comparisons"] = found
    common.write_json(common.RESULTS / f"blocks_cpu_{result['date']}.json", result)


if __name__ == "__main__":
    main()
