"""Triton kernels of systems' authors beside hsgen's, in one run on one card: choosing, attending, the whole.

    python -m benchmarks.authors --sources DIR -o OUT
    python -m benchmarks.authors --sources DIR -o OUT --resume OUT/authors_CARD_DATE.json
    python -m benchmarks.authors --report                    # writes docs/authors.md

DIR/<name> are the authors' files, checkouts or unpacked packages; what is not there is said by name, with
what to fetch.  A checkout that came without git's folder has a file COMMIT.  Both get the same tensors, and
to attend the same choice; nothing is timed before its outputs are the reference's on its own choice.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hsgen
from benchmarks import authors_report, common, decode, peers, video
from benchmarks.author_kernels import AUTHORS, Author, Calls
from benchmarks.common import Json
from benchmarks.tilelang_peers import Step, forget, measured, near
from benchmarks.tilelang_peers import off as off_by
from hsgen import baselines, captures, checking, samples, timing
from hsgen.captures import Group
from hsgen.errors import PlanError
from hsgen.reference import reference
from hsgen.runtime import Kernel
from hsgen.samples import Kind
from hsgen.selection import ListSelection, from_members, members
from hsgen.spec import Spec, load

TOKENS = (8192, 32768, 131072)
SHARE = 0.01  # of an entry's time, below which its kernels are not written down

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ours:
    """What hsgen makes of one set of inputs.

    Attributes:
        kernel: None: there is none yet, and theirs is held against the reference alone.
        o: of the kernel.
        chosen: by level.
        of: the block of each row, i64[T]: rows of one choose together.
        lacks: why there is no kernel.
    """

    spec: Spec
    x: Tensors
    kernel: Kernel | None
    o: Tensor | None
    chosen: Mapping[str, ListSelection]
    of: Tensor
    lacks: str

    @classmethod
    def made(cls, spec: Spec, x: dict[str, Tensor], level: str | None) -> Ours:
        """Choose and attend."""
        if spec.axes:
            a, b, c = (int(length) for length in spec.axes)
            of = video.tiles((a, b, c), x["q"].device.type)
        else:
            query = spec.level(level).query if level else None
            rows = query.block if query and query.block else 1
            of = torch.arange(x["q"].shape[1], device=x["q"].device) // rows
        try:
            kernel = hsgen.load_kernel(spec)
            o, chosen = kernel(**x), kernel.select(**x) if spec.levels else {}
        except PlanError as error:
            lacks = str(error).partition("\n")[0]
            return cls(spec=spec, x=x, kernel=None, o=None, chosen={}, of=of, lacks=lacks)
        assert isinstance(o, Tensor)
        if spec.route:  # what heads of other ways chose says nothing
            chosen = {level: chosen[level]} if level else {}
        return cls(spec=spec, x=x, kernel=kernel, o=o, chosen=chosen, of=of, lacks="")

    def call(self, _number: int) -> object:
        """The whole of it."""
        assert self.kernel is not None
        return self.kernel(**self.x)

    def mask(self, level: str, entries: int) -> Tensor:
        """The choice of each block.  -> bool[H, M, N]"""
        blocks, order = self.of.sort(stable=True)
        rows = order[torch.searchsorted(blocks, blocks.unique())]
        few = ListSelection(level=level, indices=self.chosen[level].indices[:, rows])
        return members(few, entries)[0].transpose(0, 1).contiguous()

    def step(self) -> tuple[Json, timing.Call]:
        """Held against the reference, on its own choice and beside the reference's.

        Raises:
            NotExpressibleError: there is no kernel.
        """
        if self.o is None:
            raise checking.NotExpressibleError(self.lacks)
        if self.spec.axes:
            (level,) = (each.name for each in self.spec.levels if each.select)
            indices = self.chosen[level].indices
            return video.check_rows(self.spec, self.x, self.o, indices), self.call
        runs = checking.sampled(self.spec, self.o.shape[1])
        return checking.compare(self.spec, self.x, self.o, self.chosen, runs), self.call


# --- what theirs is worth


def steps(author: Author, ours: Ours, calls: Calls) -> dict[str, Step]:
    """hsgen's whole, and what the author's code has of it."""
    found: dict[str, Step] = {"hsgen": ours.step}
    level, choice = author.level, calls.choose
    if choice and level:
        found["choose"] = lambda: (judged(ours, level, calls.listed(choice())), _plain(choice))
    if calls.attend and level:
        found["attend"] = functools.partial(attended, ours, level, calls)
    if calls.whole:
        found["whole"] = functools.partial(loose if author.loose else whole, ours, level, calls)
    return found


def attended(ours: Ours, level: str, calls: Calls) -> tuple[Json, timing.Call]:
    """On hsgen's choice, held against hsgen's output in every row."""
    attend = calls.attend
    assert attend is not None
    if ours.o is None:
        raise checking.NotExpressibleError(ours.lacks)
    entries = 1 + int(ours.chosen[level].indices.max())
    given = calls.given(ours.mask(level, entries))
    return {"error": near(attend(given), ours.o)}, lambda _: attend(given)


def whole(ours: Ours, level: str | None, calls: Calls) -> tuple[Json, timing.Call]:
    """On its own choice, held against the reference of that in sampled rows; where it chooses nothing that
    can be compared, against hsgen's output.
    """
    call = calls.whole
    assert call is not None
    o = call()
    if level is not None and calls.choose is not None:
        mask = calls.listed(calls.choose())
        return {"error": off(ours, o, lambda of: {level: rows_of(level, mask, of)})}, _plain(call)
    if ours.o is None:
        return {"error": off(ours, o, lambda _of: {})}, _plain(call)
    return {"error": near(o.to(ours.o.dtype), ours.o)}, _plain(call)


def loose(ours: Ours, _level: str | None, calls: Calls) -> tuple[Json, timing.Call]:
    """Held beside hsgen's output, and both beside dense attention in the middle and the last row."""
    call = calls.whole
    assert call is not None
    o, q, k, v = call(), *(ours.x[name] for name in ("q", "k", "v"))
    assert ours.o is not None
    if not bool(o.isfinite().all()):
        raise checking.CheckError("outputs are not finite")
    far = [0.0, 0.0]
    for end in (o.shape[1] // 2, o.shape[1]):
        right = baselines.last_row(q[:, :end], k[:, :end], v[:, :end]).double()
        both = [checking.relative(y[:, end - 1], right) for y in (o, ours.o)]
        far = [max(pair) for pair in zip(far, both, strict=True)]
    return {"from_ours": off_by(o, ours.o), "from_dense": far}, _plain(call)


def off(ours: Ours, o: Tensor, given: Callable[[Tensor], Mapping[str, ListSelection]]) -> float:
    """How far outputs are from the right ones.  given: the blocks of rows i64[R] -> what these chose

    Raises:
        CheckError: too far.
    """
    if ours.spec.axes:  # rows of a tile ask for all of it: hsgen stands for the reference
        assert ours.kernel is not None
        right = ours.kernel(**ours.x, selection=given(ours.of))
        assert isinstance(right, Tensor)
        return near(o, right)
    error, runs = 0.0, checking.sampled(ours.spec, o.shape[1])
    spans = [
        span for branch in ours.spec.attend if branch.static for span in branch.static.per_head
    ]
    if any(span.grow for span in spans):  # a window that grows is known at the whole length alone
        runs = runs[-1:]
    for a, b in runs:
        part = checking.standins.rows_of(ours.spec, ours.x, a, b)
        chosen = given(ours.of[a:b]) or None
        right = reference(ours.spec, part, selection=chosen, q_offset=a, keep_scores=False)
        error = max(error, checking.require_close(o[:, a:b], right.o, "of the whole"))
    return error


def rows_of(level: str, mask: Tensor, of: Tensor) -> ListSelection:
    """A choice of blocks as one of their rows."""
    few, index = torch.unique(of, return_inverse=True)
    lists = from_members(level, mask[:, few].transpose(0, 1)).indices
    return ListSelection(level=level, indices=lists[index][None])


def judged(ours: Ours, level: str, mask: Tensor) -> Json:
    """A choice bool[H, M, N] beside hsgen's, and both beside the reference's in sampled rows.

    entries: of a block of rows, the mean.  as_ours: the share of hsgen's; more: how many to one of hsgen's.
    same_choice: the share of the reference's; kept: of the mass that a row gives, where masses choose, theirs
    and hsgen's.
    """
    figures: Json = {"entries": float(mask.sum(-1, dtype=torch.float32).mean())}
    own = None
    if ours.chosen:
        own = ours.mask(level, mask.shape[-1]).expand_as(mask)  # heads may choose as one
        figures["as_ours"] = float((mask & own).sum() / own.sum())
        figures["more"] = float(mask.sum() / own.sum())
    if ours.spec.axes:
        return figures
    same, kept, select = 1.0, [1.0, 1.0], ours.spec.level(level).select
    assert select is not None
    for a, b in checking.sampled(ours.spec, len(ours.of)):
        part = checking.standins.rows_of(ours.spec, ours.x, a, b)
        free = reference(ours.spec, part, q_offset=a)
        theirs = mask[:, ours.of[a:b]].transpose(0, 1)
        right = members(free.selection[level], mask.shape[-1])[0].expand_as(theirs)
        same = min(same, float((right & theirs).sum() / right.sum()))
        if own is not None and (select.top_p or select.threshold):
            masses = free.scores[level][0]
            masses = masses.masked_fill(masses == -torch.inf, 0.0)
            masses = torch.nn.functional.pad(masses, (0, mask.shape[-1] - masses.shape[-1]))
            both = (theirs, own[:, ours.of[a:b]].transpose(0, 1))
            parts = [float((masses * each).sum() / masses.sum()) for each in both]
            kept = [min(pair) for pair in zip(kept, parts, strict=True)]
    masses_choose = own is not None and (select.top_p or select.threshold)
    return figures | {"same_choice": same} | ({"kept": kept} if masses_choose else {})


def one_step(spec: Spec, context: int, author: Author, args: argparse.Namespace) -> dict[str, Step]:
    """A step of each of several sequences, in CUDA graphs, and their attention on the same choice."""
    layers = decode.Layers(spec, args.batch, context, args.device, layers=1, page=None)
    (cache,) = layers.caches
    _, error = decode.checked(layers)
    o, chosen = layers.attn.decode(
        layers.q, layers.k, layers.v, cache, return_selection=True, **layers.others
    )
    x = {"q": layers.q, "lengths": cache.lengths.int().clone()}
    x |= {name: cache.tensors[name] for name in "kv"}
    calls = author.make(functools.partial(author.load, args.sources), spec, x)
    attend, level = calls.attend, author.level
    assert attend is not None
    assert level is not None
    lists = chosen[level].indices[:, 0].contiguous()
    ours = decode.graphed(lambda: layers.step(cache), args.device)

    def theirs() -> tuple[Json, timing.Call]:
        figures = {"error": near(attend(lists), o)}
        replay = decode.graphed(lambda: attend(lists), args.device)
        return figures, lambda _: replay()

    def everything() -> tuple[Json, timing.Call]:
        found = dict(decode.dense_calls(spec, layers, context, args.device))
        replay = decode.graphed(
            next(iter(found[n] for n in ("cuDNN", "math") if n in found)), args.device
        )
        return {}, lambda _: replay()

    return {
        "hsgen": lambda: ({"error": error}, lambda _: ours()),
        "attend": theirs,
        "dense": everything,
    }


def _plain(call: Callable[[], Tensor]) -> timing.Call:
    return lambda _: call()


# --- measuring


def case(
    name: str, kind: Kind, tokens: int, groups: Sequence[Group], args: argparse.Namespace
) -> Json:
    """One author's kernels at one length, beside hsgen's and dense attention."""
    author = AUTHORS[name]
    spec = author.spec(load(author.system), tokens)
    if author.steps:
        with torch.no_grad():
            return written(
                measured(one_step(spec, tokens, author, args), args.device, args.seconds)
            )
    x = samples.make(spec, kind, tokens, args.device, 0, groups)
    author.inputs(x)
    load_theirs = functools.partial(author.load, args.sources)
    with torch.no_grad():
        calls = author.make(load_theirs, spec, x)
        ours = Ours.made(spec, x, author.level)
        variant = baselines.variants(spec, args.device)[0]
        dense = baselines.dense(variant, x["q"], x["k"], x["v"], causal=spec.causal)
        found = measured(
            {**steps(author, ours, calls), "dense": lambda: ({}, dense)}, args.device, args.seconds
        )
    return written(found)


def written(found: Json) -> Json:
    """Of each step's kernels the time of all, and, of theirs, those that count."""
    for step, entry in found.items():
        kernels = entry.get("kernels", {})
        all_of = sum(kernels.values())
        least = 0 if step == "hsgen" else SHARE * all_of
        kept = {name: ms for name, ms in kernels.items() if ms >= least}
        entry |= {"kernels": kept, "device_ms": all_of} if kernels else {}
    return found


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every author and length; results are on disk after each."""
    made = common.provenance("benchmarks.authors", common.without_folders(argv), args.device)
    path = args.output / f"authors_{common.slug(made['card'])}_{made['date']}.json"
    made["peers"] = {name: version(AUTHORS[name], args.sources) for name in args.authors}
    groups = captures.load(args.capture)
    data: Json = common.read_json(args.resume) if args.resume else {"runs": [], "cases": {}}
    data["runs"].append(made)
    start = time.monotonic()
    for tokens, kind, name in itertools.product(args.tokens, args.inputs, args.authors):
        if f"{name}/{tokens}/{kind}" in data["cases"]:
            continue
        if time.monotonic() - start > args.budget:
            print(name, tokens, kind, "not begun: no time is left", flush=True)
            continue
        wanted = (name, kind, tokens, groups, args)
        found = checking.attempt(lambda wanted=wanted: {"steps": case(*wanted)})
        data["cases"][f"{name}/{tokens}/{kind}"] = {
            "author": name,
            "tokens": tokens,
            "inputs": kind,
            **found,
        }
        common.write_json(path, data)
        print(name, tokens, kind, authors_report.said(found), flush=True)
        forget(args.device)
    return path


def version(author: Author, sources: Path) -> Json:
    """Which of their files these are; why that is not known, where they are not there."""
    try:
        folder = author.folder(sources)
    except FileNotFoundError as error:
        return {"repository": author.repository, "package": author.package, "commit": str(error)}
    if author.package:
        return peers.origin("", author.package, folder)[1]
    return peers.origin(author.repository, "", sources)[1]


# --- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time Triton kernels of systems' authors beside.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--inputs", choices=("real", "random"), nargs="+", default=["real"])
    parser.add_argument("--authors", choices=AUTHORS, nargs="+", default=list(AUTHORS))
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="of timing, a case's calls in turn"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds to begin a case in"
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--capture", type=Path, default=common.SHIPPED_CAPTURE)
    parser.add_argument("--sources", type=Path, help="the folder that their files are in")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument(
        "--resume", type=Path, help="results of the same card, to add what they lack"
    )
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--docs", type=Path, default=common.ROOT / "docs")
    args = parser.parse_args(argv)
    if args.report is None and args.sources is None:
        parser.error("--sources DIR is needed to measure, where DIR/<name> are the authors' files")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    return common.written(args, argv, "authors", run, authors_report.page)


if __name__ == "__main__":
    raise SystemExit(main())
