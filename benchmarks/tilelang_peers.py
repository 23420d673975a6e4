"""TileLang's kernels of DSA and HISA beside hsgen's, in one run on one card: choosing, attending, gradients.

    python -m benchmarks.tilelang_peers --sources DIR -o OUT
    python -m benchmarks.tilelang_peers --sources DIR -o OUT --resume OUT/tilelang_peers_CARD_DATE.json
    python -m benchmarks.tilelang_peers --report             # writes docs/tilelang_peers.md

DIR/tilelang is a checkout of tile-ai/tilelang, whose examples are read; the package `tilelang` is installed.
Both get the same index in e4m3, or the same choice; nothing is timed before it agrees with the reference, or
with hsgen's output.  Heads, sizes and budgets are those of DeepSeek-V3.2.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import hsgen
from benchmarks import common, peers, tilelang_report
from benchmarks.common import Json
from hsgen import captures, checking, samples, standins, timing
from hsgen.captures import Group
from hsgen.reference import reference
from hsgen.samples import Kind
from hsgen.selection import ListSelection
from hsgen.spec import Spec, load

REPOSITORY = "tile-ai/tilelang"
TOKENS = (8192, 32768, 131072)
GRADIENTS = 8192  # tokens that gradients are timed up to
KINDS: tuple[Kind, ...] = ("random", "real")
LEVEL = "token"
ROWS = 4096  # whose scores are there at a time: those of 131,072 rows are 64 GiB
ROOM = 4096  # scores beside the K-th that their selector has room for; it does not look
ALIKE = 1e-2  # |theirs - ours| / |ours| of outputs and gradients: bf16 twice

Tensors = Mapping[str, Tensor]
Step = Callable[[], tuple[Json, timing.Call]]  # checks, then: figures, and the call to time

# --- inputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Index:
    """An index as TileLang takes it.

    Attributes:
        q: e4m3[T, Hi, Di].
        k: e4m3[T, Di].
        k_scale: f32[T].
        weights: f32[T, Hi], scales of queries in them.
        starts: i32[T], the first key of a row,
        ends: i32[T], and the one after its last.
    """

    q: Tensor
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    starts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, x: Tensors) -> Index:
        """The index of one sequence."""
        q, q_scale = eight(x["q_index"][0])
        k, k_scale = eight(x["k_index"][0])
        ends = torch.arange(1, len(q) + 1, dtype=torch.int32, device=q.device)
        weights = x["w_index"][0].float() * q_scale
        starts = torch.zeros_like(ends)
        return cls(q=q, k=k, k_scale=k_scale, weights=weights, starts=starts, ends=ends)


def eight(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] in e4m3, and the power of two of each, as `index: dtype: fp8` means it."""
    greatest = x.float().abs().amax(-1).clamp(min=1e-4)
    mantissa, exponent = torch.frexp(greatest / 448)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def inputs(
    spec: Spec, kind: Kind, tokens: int, device: str, groups: Sequence[Group]
) -> dict[str, Tensor]:
    """What the spec reads, its index of numbers that e4m3 has, so that nobody rounds them again."""
    x = samples.make(spec, kind, tokens, device, 0, groups)
    for name in ("q_index", "k_index"):
        kept, scale = eight(x[name])
        x[name] = (kept.float() * scale[..., None]).to(x[name].dtype)
    if kind == "random":
        x["w_index"].normal_(generator=torch.Generator(device).manual_seed(1))
    return x


# --- what a choice is worth


def flat_scores(x: Tensors, a: int, b: int) -> Tensor:
    """Scores of rows from a to b, -inf where they do not see.  -> f64[b - a, b]"""
    q, w = (x[name][0, a:b].double() for name in ("q_index", "w_index"))
    k = x["k_index"][0, :b].double()
    rows = [w[t] @ (q[t] @ k.mT).relu() for t in range(b - a)]
    position = torch.arange(b, device=k.device)
    return torch.stack(rows).masked_fill(position > position[a:b, None], -torch.inf)


def judged(spec: Spec, x: Tensors, chosen: Tensor) -> Json:
    """A choice i32[T, K], -1 where there is none, beside the reference's and the best of all tokens.

    Raises:
        CheckError: it is neither.
    """
    same, flat, short = 1.0, 1.0, 0.0
    for a, b in checking.sampled(spec, len(chosen)):
        rows, part = chosen[a:b], standins.rows_of(spec, x, a, b)
        own = reference(spec, part, q_offset=a, keep_scores=False).selection[LEVEL]
        assert isinstance(own, ListSelection), "tokens are chosen as lists"
        same = min(same, share(rows, own.indices[0, :, 0]))
        scores = flat_scores(x, a, b)
        best = scores.topk(min(rows.shape[1], b), dim=-1).values
        mine = scores.gather(1, rows.clamp(min=0).long()).masked_fill(rows < 0, -torch.inf)
        good = (mine >= best[:, -1:]) & (mine > -torch.inf)  # whichever of equal ones
        flat = min(flat, float(good.sum() / (best > -torch.inf).sum()))
        least = mine.masked_fill(rows < 0, torch.inf).amin(1)
        unit = scores.masked_fill(scores.isinf(), 0.0).abs().amax(1)
        short = max(short, float(((best[:, -1] - least) / unit).max()))
    if not max(same, flat) >= checking.SAME:
        raise checking.CheckError(
            f"{same:.1%} of the reference's choice and {flat:.1%} of the best tokens, "
            f"expected {checking.SAME:.0%} of either"
        )
    return {"same_choice": same, "of_flat": flat, "short": short}


def share(chosen: Tensor, own: Tensor) -> float:
    """Share of `own` that is in `chosen` too, row by row; negative: nothing.  [R, K], each distinct"""
    both = 0
    for theirs, ours in zip(chosen.split(ROWS), own.split(ROWS), strict=True):
        ordered = torch.cat([theirs, ours], 1).sort(1).values
        both += int(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum())
    return both / max(1, int((own >= 0).sum()))


def require_distinct(chosen: Tensor) -> None:
    """Nothing, if no row has an entry twice.  i32[T, K]

    Raises:
        CheckError: some row has.
    """
    for rows in chosen.split(ROWS):
        ordered = rows.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise checking.CheckError("a row has an entry twice")


def fullest(scores: Tensor, ends: Tensor, count: int) -> int:
    """Scores of a row that share the high byte of their float16 with the `count`-th, at the most.

    Args:
        scores: f32[R, S], of which each row has those before `ends`, i32[R].
        count: how many of a row are chosen.
    """
    most = 0
    for rows, last in zip(scores.split(512), ends.split(512), strict=True):
        seen = torch.arange(rows.shape[1], device=rows.device) < last[:, None]
        rows = torch.where(seen, rows, -torch.inf)
        least = rows.topk(min(count, rows.shape[1]), dim=-1).values[:, -1:]
        held = (_high_byte(rows) == _high_byte(least)).sum(1)
        most = max(most, int(held.masked_fill(last < count, 0).max()))
    return most


def _high_byte(scores: Tensor) -> Tensor:
    """Of a float16, so that greater ones have greater bytes."""
    bits = scores.half().view(torch.int16).int() & 0xFFFF
    return torch.where(scores < 0, ~bits & 0xFFFF, bits | 0x8000) >> 8


# --- choosing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Theirs:
    """A checkout's examples as modules."""

    sources: Path

    def module(self, folder: str, name: str) -> ModuleType:
        """One of them; it is imported when it is first asked for."""
        return peers.imported(self.sources.resolve() / "tilelang" / "examples" / folder, name)

    def dsa(self, name: str) -> ModuleType:
        """Of DSA."""
        return self.module("deepseek_v32", name)


def index_scores(theirs: Theirs, index: Index) -> Iterator[tuple[int, int, Tensor]]:
    """Rows from and to, and their scores f32[rows, to], undefined where a row does not see."""
    module, (T, heads, dim) = theirs.dsa("fp8_lighting_indexer"), index.q.shape
    for a in range(0, T, ROWS):
        b = min(a + ROWS, T)
        yield (
            a,
            b,
            module.mqa_attn_return_logits(
                index.q[a:b].view((b - a) * heads, dim),
                index.k[:b],
                index.k_scale[:b],
                index.weights[a:b],
                index.starts[a:b],
                index.ends[a:b],
            ),
        )


def by_selector(theirs: Theirs, index: Index, count: int) -> Tensor:
    """Their scores and their selector.  -> i32[T, count]"""
    select = theirs.dsa("topk_selector").tl_topk
    chosen = [
        select(scores, index.starts[a:b], index.ends[a:b], count)
        for a, b, scores in index_scores(theirs, index)
    ]
    return torch.cat(chosen)


def by_torch(theirs: Theirs, index: Index, count: int) -> Tensor:
    """Their scores, cleaned by them, and PyTorch's top-k.  -> i64[T, count]"""
    clean, chosen = theirs.dsa("fp8_lighting_indexer").clean_logits_, []
    for a, b, scores in index_scores(theirs, index):
        clean(scores, index.starts[a:b], index.ends[a:b])
        chosen.append(scores.topk(count, dim=-1).indices)
    return torch.cat(chosen)


def within(chosen: Tensor, ends: Tensor) -> Tensor:
    """Without what no row of fewer tokens has chosen: the slots after its tokens, and others' tokens."""
    slot = torch.arange(chosen.shape[1], device=chosen.device)
    kept = (slot < ends[:, None]) & (chosen < ends[:, None])
    return torch.where(kept, chosen, -1).to(torch.int32)


def own_choice(spec: Spec, x: Tensors) -> tuple[Tensor, timing.Call]:
    """hsgen's choice i32[T, K], and the call that makes it."""
    kernel = hsgen.load_kernel(spec)
    named = {name: t for name, t in x.items() if name in ("q", "k") or name.endswith("_index")}

    def call(_number: int) -> Tensor:
        return kernel.select(**named)[LEVEL].indices

    return call(0)[0, :, 0], call


def choose(spec: Spec, x: Tensors, theirs: Theirs) -> dict[str, Step]:
    """DSA's choice: hsgen's, and their scores with either selector."""
    level = spec.level(LEVEL).select
    assert level is not None
    count = level.budget
    ours, call = own_choice(spec, x)
    index = Index.of(x)

    def own() -> tuple[Json, timing.Call]:
        return judged(spec, x, ours), call

    def beside(way: Callable[[Theirs, Index, int], Tensor], full: int) -> tuple[Json, timing.Call]:
        chosen = within(way(theirs, index, count), index.ends)
        require_distinct(chosen)
        found = judged(spec, x, chosen) | {"as_ours": share(chosen, ours), "fullest": full}
        return found, lambda _: way(theirs, index, count)

    def selector() -> tuple[Json, timing.Call]:
        full = max(fullest(s, index.ends[a:b], count) for a, b, s in index_scores(theirs, index))
        if full > ROOM:
            raise checking.NotExpressibleError(
                f"their selector has room for {ROOM:,} scores beside the last one chosen; "
                f"a row has {full:,}"
            )
        return beside(by_selector, full)

    def torchs() -> tuple[Json, timing.Call]:
        return beside(by_torch, 0)

    return {"hsgen": own, "theirs": selector, "theirs, torch.topk": torchs}


def filtered(spec: Spec, x: Tensors, theirs: Theirs) -> dict[str, Step]:
    """HISA's choice."""
    block, token = spec.level("block"), spec.level(LEVEL)
    assert block.select is not None
    assert token.select is not None
    ours, call = own_choice(spec, x)
    index = Index.of(x)
    sizes = {
        "k_block_size": block.partition.size,
        "block_topk": block.select.budget,
        "topk_tokens": token.select.budget,
    }

    def own() -> tuple[Json, timing.Call]:
        return judged(spec, x, ours), call

    def beside() -> tuple[Json, timing.Call]:
        indexer = theirs.module("dsa_hisa", "hisa").hisa_indexer
        given = (index.q, index.k, index.k_scale, index.weights, index.starts, index.ends)
        chosen = indexer(*given, **sizes)
        require_distinct(chosen)
        found = judged(spec, x, chosen) | {"as_ours": share(chosen, ours)}
        return found, lambda _: indexer(*given, **sizes)

    return {"hsgen": own, "theirs": beside}


# --- attending


def attend(spec: Spec, x: Tensors, theirs: Theirs) -> dict[str, Step]:
    """Attending to hsgen's choice, by three of their kernels."""
    kernel, chosen = hsgen.load_kernel(spec), own_choice(spec, x)[0]
    given = {LEVEL: ListSelection(level=LEVEL, indices=chosen[None, :, None])}
    lists, scale = padded(chosen), spec.attend[0].scale
    o = kernel(**x, selection=given)
    assert isinstance(o, Tensor)

    def own() -> tuple[Json, timing.Call]:
        runs = checking.sampled(spec, len(chosen))
        return checking.compare(spec, x, o, given, runs), lambda _: kernel(**x, selection=given)

    def beside(call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Json, timing.Call]:
        found, whole = call()[0], lists.shape[-1] - 1  # the first row that sees as many as listed
        figures: Json = {"error": near(found[:, whole:], o[:, whole:])}
        if not (short := off(found[:, :whole], o[:, :whole])) < ALIKE:
            figures["short_rows"] = f"relative error {short:.2g}"
        return figures, lambda _: call()

    def plain() -> tuple[Json, timing.Call]:
        forward = theirs.dsa("sparse_mla_fwd").sparse_mla_fwd_interface
        return beside(lambda: forward(x["q"], x["k"], lists, sm_scale=scale))

    def staged(name: str) -> tuple[Json, timing.Call]:
        forward = theirs.dsa(name).sparse_mla_fwd_interface
        return beside(lambda: forward(x["q"], x["k"], lists, 0, 1, sm_scale=scale))

    return {
        "hsgen": own,
        "sparse_mla_fwd": plain,
        "sparse_mla_fwd_pipelined": functools.partial(staged, "sparse_mla_fwd_pipelined"),
        "sparse_mla_fwd_seesaw": functools.partial(staged, "sparse_mla_fwd_seesaw"),
    }


def gradients(spec: Spec, x: Tensors, theirs: Theirs) -> dict[str, Step]:
    """Gradients of the queries and latents on hsgen's choice, outputs given."""
    kernel, chosen = hsgen.load_kernel(spec), own_choice(spec, x)[0]
    given = {LEVEL: ListSelection(level=LEVEL, indices=chosen[None, :, None])}
    lists, scale = padded(chosen), spec.attend[0].scale
    q, k = (x[name].detach().requires_grad_() for name in ("q", "k"))
    o = kernel(**{**x, "q": q, "k": k}, selection=given)
    assert isinstance(o, Tensor)
    do = torch.randn(
        o.shape, generator=torch.Generator(o.device).manual_seed(2), device=o.device, dtype=o.dtype
    )

    def call(_number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, (q, k), do, retain_graph=True)

    ours = call(0)

    def own() -> tuple[Json, timing.Call]:
        if not all(bool(t.isfinite().all()) for t in ours):
            raise checking.CheckError("gradients are not finite")
        return {}, call

    def beside() -> tuple[Json, timing.Call]:
        forward = theirs.dsa("sparse_mla_fwd").sparse_mla_fwd_interface
        backward = theirs.dsa("sparse_mla_bwd").sparse_mla_bwd
        out, lse = forward(x["q"], x["k"], lists, sm_scale=scale)

        def theirs_of(_number: int) -> tuple[Tensor, Tensor]:
            return backward(x["q"], x["k"], out, do, lists, lse, sm_scale=scale)

        errors = [near(a, b) for a, b in zip(theirs_of(0), ours, strict=True)]
        return {"error": max(errors)}, theirs_of

    return {"hsgen": own, "theirs": beside}


def padded(chosen: Tensor) -> Tensor:
    """A choice i32[T, K] in their form i32[1, T, 1, K]: T, which no row sees, where there is none."""
    return torch.where(chosen < 0, len(chosen), chosen)[None, :, None].contiguous()


def near(found: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours|.  [1, T, ...]

    Raises:
        CheckError: more than ALIKE, or not finite.
    """
    error = off(found, ours)
    if not error < ALIKE:
        raise checking.CheckError(f"relative error {error:.2g} beside hsgen's, expected {ALIKE}")
    return error


def off(found: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours|, some rows at a time.  [1, T, ...]"""
    difference, size = 0.0, 0.0
    for a, b in zip(found[0].split(ROWS), ours[0].split(ROWS), strict=True):
        difference += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        size += float(b.float().square().sum(dtype=torch.float64))
    return (difference / size) ** 0.5


# --- measuring

CASES = {"choose": choose, "filter": filtered, "attend": attend, "gradients": gradients}


def measured(steps: Mapping[str, Step], device: str, seconds: float) -> Json:
    """Every step checked; then those that are right timed in turn, and by kernel."""
    found: Json = {}
    calls: dict[str, timing.Call] = {}
    for name, step in steps.items():

        def check(name: str = name, step: Step = step) -> Json:
            figures, calls[name] = step()
            return figures

        found[name] = checking.attempt(check)
        forget(device)
    with torch.no_grad():
        turns = timing.in_turn(list(calls.values()), device, seconds) if calls else []
    for (name, call), ms in zip(calls.items(), turns, strict=True):
        ends = {"median": statistics.median(ms), "least": min(ms), "most": max(ms)}
        found[name] |= {"ms": ends | {"calls": len(ms)}}
        if device == "cuda":
            found[name]["kernels"] = by_name(timing.kernel_times(call))
    return found


def by_name(took: Mapping[str, float]) -> dict[str, float]:
    """Times of kernels by their names without types, longest first."""
    named: dict[str, float] = {}
    for name, ms in took.items():
        plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        plain = plain.split("<")[0].split("(")[0].strip()
        named[plain] = named.get(plain, 0.0) + ms
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def case(
    part: str,
    kind: Kind,
    tokens: int,
    device: str,
    groups: Sequence[Group],
    theirs: Theirs,
    *,
    seconds: float,
) -> Json:
    """One part on one kind of input."""
    spec = load(tilelang_report.SYSTEMS[part][1])
    x = inputs(spec, kind, tokens, device, groups)
    return measured(CASES[part](spec, x, theirs), device, seconds)


def forget(device: str) -> None:
    """Free memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every part, length and kind; results are on disk after each."""
    made = common.provenance("benchmarks.tilelang_peers", common.without_folders(argv), args.device)
    path = args.output / f"tilelang_peers_{common.slug(made['card'])}_{made['date']}.json"
    made["peer"] = peers.origin(REPOSITORY, "", args.sources)[1] | {"version": version()}
    groups = captures.load(args.capture)
    data: Json = {"runs": [], "cases": {}}
    if args.resume:
        data = common.read_json(args.resume)
    data["runs"].append(made)
    start = time.monotonic()
    for kind, tokens, part in itertools.product(args.inputs, args.tokens, args.parts):
        if f"{part}/{tokens}/{kind}" in data["cases"] or (
            part == "gradients" and tokens > GRADIENTS
        ):
            continue
        if time.monotonic() - start > args.budget:
            print(part, tokens, kind, "not begun: no time is left", flush=True)
            continue
        entry: Json = {"part": part, "tokens": tokens, "inputs": kind}
        wanted = (part, kind, tokens, args.device, groups, Theirs(sources=args.sources))
        found = checking.attempt(
            lambda wanted=wanted: {"steps": case(*wanted, seconds=args.seconds)}
        )
        data["cases"][f"{part}/{tokens}/{kind}"] = entry | found
        common.write_json(path, data)
        print(part, tokens, kind, tilelang_report.said(found), flush=True)
        forget(args.device)
    return path


def version() -> str:
    """Of the package that compiles them; none where it is not installed."""
    try:
        return importlib.metadata.version("tilelang")
    except importlib.metadata.PackageNotFoundError:
        return "none"


# --- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time TileLang's kernels of DSA and HISA beside.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--inputs", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--parts", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="of timing, a case's calls in turn"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds to begin a case in"
    )
    parser.add_argument("--capture", type=Path, default=common.SHIPPED_CAPTURE)
    parser.add_argument("--sources", type=Path, help="the folder that their checkout is in")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument(
        "--resume", type=Path, help="results of the same card, to add what they lack"
    )
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--docs", type=Path, default=common.ROOT / "docs")
    args = parser.parse_args(argv)
    if args.report is None and args.sources is None:
        parser.error("--sources DIR is needed to measure, where DIR/tilelang is their checkout")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    if args.report is None:
        run(args, sys.argv[1:] if argv is None else argv)
        return 0
    results = [common.read_json(path) for path in common.found(args.report, "tilelang_peers")]
    (args.docs / "tilelang_peers.md").write_text(tilelang_report.page(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
