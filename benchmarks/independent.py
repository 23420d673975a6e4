"""The reference beside independent implementations in plain PyTorch, on CPU.

    python -m benchmarks.independent --sources DIR     DIR/<repository> are checkouts of the peers
    python -m benchmarks.independent --report          docs/independent.md from the results

Their code is read from the checkouts and no part of this one; only figures are kept.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Json
from benchmarks.peers import Missing, OnCPU, modules, origin
from hsgen import standins
from hsgen.execution import interpreting
from hsgen.reference import Result, reference, tensor_shapes
from hsgen.spec import Spec, load, parse

PAGE = common.ROOT / "docs" / "independent.md"
# of results: this script's, those of independent_odd, _trained, _blocks, _pooled and _production
KINDS = ("independent", "odd", "trained", "blocks", "pooled", "transformers")
TOLERANCE = 1e-5  # the peers compute in float32

FLA_NSA = """
hsgen: 1
name: fla_nsa
heads: {query: 32, kv: 2}
head_dim: {qk: 32, v: 16}
levels:
  - name: compressed
    partition: {blocks: 16}
    pool: {keys: mean, values: mean}
    score: {form: dot, normalise: softmax, share: group, reduce: mean}
  - name: block
    partition: {blocks: 16}
    score: {from: compressed, map: sum}
    select: {top_k: 5, force: {first: 1, last: 2}}
attend:
  - {name: compressed, over: compressed, values: pooled}
  - {name: selected, over: block}
combine: {gates: input}
"""

FLA_DSA = """
hsgen: 1
name: fla_dsa
heads: {query: 6, kv: 2}
head_dim: {qk: 32, v: 32}
index: {heads: 8, dim: 16, keys: shared}
levels:
  - name: token
    partition: tokens
    score: {form: relu_weighted, share: all}
    select: {top_k: 24}
attend:
  - {name: selected, over: token}
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a peer says.

    Attributes:
        o: [1, T, Hq, Dv] or packed.
        selection: [..., T, Hs, K], order free.
        scores: [..., T, Hs, N], what its level orders entries by; None: not handed out.
    """

    o: Tensor
    selection: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One peer beside one spec.

    Attributes:
        repository: as GitHub names it; its checkout is DIR/<last part>.
        package: instead, as PyPI names it; it is installed into DIR.
        files: the modules that are read, by path in the checkout, in order.
        what: what is compared, and the sizes.
        adapted: what of theirs does not run as it is written.
        level: the selecting level.
        run: (spec, modules by stem) -> theirs, ours.
        stand_ins: what they import and cannot be had here, by module.
    """

    repository: str = ""
    package: str = ""
    files: tuple[str, ...]
    what: str
    adapted: str = ""
    level: str
    spec: Callable[[], Spec]
    run: Callable[[Spec, Mapping[str, types.ModuleType]], tuple[Answer, Result]]
    stand_ins: Mapping[str, Missing] = field(default_factory=dict)


# --- inputs


def tensors(spec: Spec, T: int, seed: int, *, packed: bool = False) -> dict[str, Tensor]:
    """Normal numbers in float64 for everything that a spec needs.  [1, T, ...], or packed [T, ...]

    Pooled keys are normal as well, or float32 would round most softmax masses to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in tensor_shapes(spec, 1, T, T).items()
    }
    learned = {name for name in made if name.endswith(("_weight", "_position"))}
    for name in learned:
        if name.endswith("_weight"):  # [Hkv, size, D, D']
            made[name] /= (made[name].shape[1] * made[name].shape[2]) ** 0.5
    return {n: t[0] if packed and n not in learned else t for n, t in made.items()}


def i32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# --- peers


def moba(spec: Spec, peer: Mapping[str, types.ModuleType]) -> tuple[Answer, Result]:
    """Documents of 5, 16, 33 and 130 tokens, packed."""
    cu = i32(0, 5, 21, 54, 184)
    x = tensors(spec, 184, 1, packed=True)
    size = spec.level("chunk").partition.size
    o = peer["moba_naive"].moba_attn_varlen_naive(x["q"], x["k"], x["v"], cu, 130, size, 3)
    # theirs is inside the function: the selection is not handed out
    return Answer(o=o, selection=torch.empty(0)), reference(spec, x, cu_seqlens_q=cu)


def fla_nsa(spec: Spec, peer: Mapping[str, types.ModuleType]) -> tuple[Answer, Result]:
    """One sequence of 200 tokens, so that its last block is short."""
    x = tensors(spec, 200, 2)
    compressed, selected = x["gates"].unbind(-1)
    o, chosen = peer["naive"].naive_nsa(
        x["q"],
        x["k"],
        x["v"],
        g_cmp=compressed,
        g_slc=selected,
        block_counts=5,
        block_size=16,
        return_block_indices=True,
    )
    return Answer(o=o, selection=chosen), reference(spec, x)


def fla_dsa(spec: Spec, peer: Mapping[str, types.ModuleType]) -> tuple[Answer, Result]:
    """One sequence of 150 tokens; one index head is positive, so that no score is exactly 0."""
    x = tensors(spec, 150, 3)
    x["k_index"] = x["k_index"].abs()
    x["q_index"][:, :, 0] = x["q_index"][:, :, 0].abs()
    o, chosen = peer["naive"].naive_dsa(
        x["q"],
        x["k"],
        x["v"],
        x["q_index"],
        x["k_index"],
        x["w_index"],
        topk=24,
        return_indices=True,
    )
    return Answer(o=o, selection=chosen.unsqueeze(2)), reference(spec, x)


def xunhao_nsa(spec: Spec, peer: Mapping[str, types.ModuleType]) -> tuple[Answer, Result]:
    """Documents of 704 and 640 tokens; the window's gate is 0, since theirs is flash-attn."""
    lengths, total = (704, 640), 1344
    cu = i32(0, 704, 1344)
    x = tensors(spec, total, 4, packed=True)
    x["gates"][..., 2] = 0
    compress = peer["compress_key_value"].linear_compress_torch
    pooled, cu_pooled = {}, None
    for kind in ("key", "value"):
        weight = x[f"compressed_{kind}_weight"]
        position = x[f"compressed_{kind}_position"]
        flat = weight.flatten(1, 2)
        source = x[f"{kind[0]}_compressed"]
        pooled[kind], cu_pooled = compress(source, flat, cu, 32, 16, position)
    o_compressed, chosen = peer["compressed_attention"].compressed_attention_torch(
        x["q"], pooled["key"], pooled["value"], 32, 16, 64, 5, cu, cu_pooled, max(lengths), 43
    )
    attend = peer["topk_sparse_attention"].topk_sparse_attention_torch
    o_selected = attend(x["q"], x["k"], x["v"], chosen, 64, cu)
    gates = x["gates"].unsqueeze(-1)
    o = gates[..., 0, :] * o_compressed + gates[..., 1, :] * o_selected
    return Answer(o=o, selection=chosen.transpose(0, 1)), reference(spec, x, cu_seqlens_q=cu)


def _block_means(x: Tensor, size: int, cu_seqlens: Tensor | None) -> Tensor:
    """What fla's file imports from its own package, where that is Triton."""
    assert cu_seqlens is None, "one sequence at a time"
    return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)


def _moba_spec() -> Spec:
    return common.with_blocks(standins.bind(load("moba"), query=4, kv=4, dim=32), "chunk", 16)


def _nsa_spec() -> Spec:
    small = standins.bind(load("nsa"), query=8, kv=2, dim=32)
    return common.with_budget(small, "block", 5)


POOLING = types.ModuleType("fla.ops.utils.pooling")
POOLING.mean_pooling = _block_means  # type: ignore[attr-defined]
FLA: dict[str, Missing] = {
    "fla.ops.utils": ("prepare_chunk_offsets",),
    POOLING.__name__: POOLING,
}
XUNHAO = "native_sparse_attention/ops/torch"
COMPARISONS = {
    "moba": Comparison(
        repository="MoonshotAI/MoBA",
        files=("moba/moba_naive.py",),
        what="4 heads, D 32, chunks of 16, top 3; documents of 5, 16, 33 and 130 tokens",
        level="chunk",
        spec=_moba_spec,
        run=moba,
    ),
    "nsa (fla)": Comparison(
        repository="fla-org/flash-linear-attention",
        files=("fla/ops/nsa/naive.py",),
        what="32/2 heads, D 32 and 16, mean blocks of 16, top 5 with 1 + 2 forced; 200 tokens",
        level="block",
        spec=lambda: parse(FLA_NSA),
        run=fla_nsa,
        stand_ins=FLA,
    ),
    "nsa (XunhaoLai)": Comparison(
        repository="XunhaoLai/native-sparse-attention-triton",
        files=tuple(
            f"{XUNHAO}/{stem}.py"
            for stem in ("compress_key_value", "compressed_attention", "topk_sparse_attention")
        ),
        what="8/2 heads, D 32, linear 32 by 16, blocks of 64, top 5 with 1 + 2 forced; "
        "documents of 704 and 640 tokens",
        level="block",
        spec=_nsa_spec,
        run=xunhao_nsa,
    ),
    "dsa (fla)": Comparison(
        repository="fla-org/flash-linear-attention",
        files=("fla/ops/dsa/naive.py",),
        what="6/2 heads, D 32, 8 index heads of 16, top 24 tokens; 150 tokens",
        level="token",
        spec=lambda: parse(FLA_DSA),
        run=fla_dsa,
        stand_ins=FLA,
    ),
}


# --- comparing


def compare(comparison: Comparison, sources: Path) -> Json:
    """Figures of one comparison."""
    checkout, where = origin(comparison.repository, comparison.package, sources)
    read = modules(checkout, comparison.files, comparison.stand_ins)
    with OnCPU():
        theirs, ours = comparison.run(comparison.spec(), read)
    error = (theirs.o.double() - ours.o).norm() / ours.o.norm()
    worst = (theirs.o.double() - ours.o).abs().amax() / ours.o.abs().amax()
    figures: Json = {
        **where,
        "files": list(comparison.files),
        "what": comparison.what,
        "error": float(error),
        "worst": float(worst),
    }
    if comparison.adapted:
        figures["adapted"] = comparison.adapted
    if theirs.selection.numel():
        same = same_rows(theirs.selection, ours.selection[comparison.level].indices)
        figures |= {"rows": same.numel(), "same_rows": int(same.sum())}
    if theirs.scores is not None:
        mine = ours.scores[comparison.level]
        ranked = mine > -torch.inf
        off = (theirs.scores - mine)[ranked].abs().amax()
        figures["scores"] = float(off / mine[ranked].abs().amax())
    return figures


def same_rows(left: Tensor, right: Tensor) -> Tensor:
    """Rows of two selections that are equal as sets; -1 fills.  [..., K] -> bool[...]"""
    width = max(left.shape[-1], right.shape[-1])
    padded = [
        torch.nn.functional.pad(t.long(), (0, width - t.shape[-1]), value=-1).sort(-1).values
        for t in (left, right)
    ]
    return (padded[0] == padded[1]).all(-1)


TRANSFORMERS = """
## Beside transformers' own modules

Models of random weights and tiny sizes.  Their projections, and norms and rotations of tokens, make both
sides' inputs; *index* compares choices alone.  Choices are equal, as the scores of what is chosen, in every
row; the sets differ where scores tie: a sum of relu is exactly 0 for many entries.

"""
BLOCKS = """
## Beside peers that choose

Systems whose attention kernels run on a GPU only, but choose in plain PyTorch.  *Worst* is the largest
difference of what is chosen by, of svg2's outputs, over its largest value; rows are those of a query
block and a head, of minference what a head chooses of columns and of diagonals.

"""
POOLED = """
## Beside peers that choose by pooled queries and keys

Ours are the shipped specs with fewer heads and channels.  What is Triton of theirs runs in its interpreter:
scores and attention of psa, means and cosines of sparge, means of flex_prefill.  *Error* is that of outputs;
those of draft_attention_head are dense attention under the mask, and in the order, that theirs hands to a
kernel, and sparge's kernels are of int8.  *Worst* and rows are as above.  Left out is where theirs does
otherwise, see [peer_bugs.md](peer_bugs.md): short last blocks of pbs_attn and sparge, equal scores and merged
blocks of psa.  Of draft_attention_head each head keeps one pair more, as theirs does; of flex_prefill blocks
of diagonals begin elsewhere where 128 does not divide the length, so that there all heads are pooled.

"""
TEXT = """# The reference beside independent implementations

hsgen's float64 reference is what every kernel is tested against, so it is itself held against code that
others wrote from the same papers, in plain PyTorch, on CPU.  Their code is no part of this repository.
*Error* is |theirs − ours| / |ours| over the whole output, *worst* the largest difference over the largest
value; some compute in float32.  *Same choice* counts rows (query and selecting head) whose sets are equal.
Notes say what is *adapted*: what of theirs does not run as it is written.

"""


def page(results: Sequence[Json]) -> str:
    """docs/independent.md, of checkouts' results and of those beside transformers' modules."""
    parts = [TEXT]
    whole = [_of_checkouts(result) for result in results if "transformers" not in result]
    parts += [f"\n{text}" if i and text[0] == "|" else text for i, text in enumerate(whole)]
    parts += [_of_transformers(result) for result in results if "transformers" in result]
    return "".join(parts)


def _of_checkouts(result: Json) -> str:
    known = {key for figures in result["comparisons"].values() for key in figures}
    head = "" if "error" in known else POOLED if "outputs" in known else BLOCKS
    notes = []
    for name, figures in result["comparisons"].items():
        notes.append(f"- {name}: {_noted(figures)}")
    return f"{head}{_table(result)}\n" + "\n".join([*notes, f"\n{_made(result)}\n"])


def _noted(figures: Json) -> str:
    """Where theirs is from, and how it was run where that is not as written."""
    if "package" in figures:
        place = f"PyPI's {figures['package']} {figures['version']}"
    else:
        repository = figures["repository"]
        place = f"[{repository}](https://github.com/{repository}) at {figures['commit'][:10]}"
    noted = [f"{place}, {', '.join(f'`{file}`' for file in figures['files'])}"]
    if "scores" in figures and "error" in figures:
        noted.append(f"what is chosen by differs by {figures['scores']:.1e} at most")
    if "adapted" in figures:
        noted.append(f"adapted: {figures['adapted']}")
    return "; ".join(noted)


def _of_transformers(result: Json) -> str:
    models = {figures["model"]: None for figures in result["comparisons"].values()}
    shown = ", ".join(f"`{model}`" for model in models)
    version = f"transformers {result['transformers']}: {shown}"
    return f"{TRANSFORMERS}{_table(result)}\n{version}\n\n{_made(result)}\n"


def _made(result: Json) -> str:
    return f"{result['date']}, torch {result['torch']}, `{result['command']}`"


def _table(result: Json) -> str:
    rows = []
    for name, figures in result["comparisons"].items():
        chosen = "no choice" if "model" in figures else "not handed out"
        if "rows" in figures:
            chosen = f"{figures['same_rows']:,} of {figures['rows']:,}"
        keys = ("outputs", "scores") if "error" not in figures else ("error", "worst")
        errors = [figures.get(key) for key in keys]
        if "model" in figures and "error" not in figures:  # choices alone
            errors = [None, None]
        shown = ["–" if error is None else f"{error:.1e}" for error in errors]
        rows.append((name, figures["what"], *shown, chosen))
    return common.table(("system", "sizes", "error", "worst", "same choice"), rows)


def kept(
    module: str,
    kind: str,
    comparisons: Mapping[str, Any],
    measure: Callable[[Any, Path], Json],
    argv: Sequence[str] | None,
) -> None:
    """The command of a module that compares with checkouts: measure, print, hold to TOLERANCE, keep."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--sources", type=Path, required=True, help="folder of the checkouts")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    result = common.provenance(module, ["--sources", "DIR"], "cpu")
    if interpreting():
        result["command"] = f"TRITON_INTERPRET=1 {result['command']}"
    found: Json = {}
    for name, each in comparisons.items():
        figures = found[name] = measure(each, args.sources)
        print(f"{name:18} {figures}")
        worst = max(figures.get(figure, 0.0) for figure in ("worst", "scores", "outputs"))
        assert worst < TOLERANCE, f"{name} differs"
    result["comparisons"] = found
    common.write_json(args.output / f"{kind}_cpu_{result['date']}.json", result)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, or write the page."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--report"]:
        paths = [path for kind in KINDS for path in common.found([], kind)]
        PAGE.write_text(page([common.read_json(path) for path in paths]))
        return
    kept("benchmarks.independent", "independent", COMPARISONS, compare, words)


if __name__ == "__main__":
    main()
