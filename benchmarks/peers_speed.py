"""GPU kernels of peers beside hsgen's, in one run on one card.

    python -m benchmarks.peers_speed --sources DIR --tokens 8192 32768 -o OUT
    python -m benchmarks.peers_speed --sources DIR -o OUT --resume OUT/peers_CARD_DATE.json
    python -m benchmarks.peers_speed --report                          # writes docs/peers.md

DIR/<repository> are checkouts of the peers; where git's folder is missing, a file COMMIT names the version.
All of NSA but its window, which the peers take from flash-attn.  What a peer cannot do is an entry with its
error, and nothing of theirs is timed before its outputs agree with hsgen's on the same selection.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import hsgen
from benchmarks import common, peer_kernels, peers, peers_report, speed
from benchmarks.common import Json
from hsgen import baselines, captures, measure, metrics, samples, standins, timing
from hsgen.captures import Group
from hsgen.checking import CheckError
from hsgen.reference import reference, tensor_shapes
from hsgen.selection import ListSelection
from hsgen.spec import Spec, load, verify

PAGE = common.ROOT / "docs" / "peers.md"
SYSTEMS = ("nsa_xunhao", "nsa_fla", "nsa")
ATTENDED = (
    "nsa_xunhao",
    "nsa_fla",
)  # where every peer attends: the third has the same selected branch
HEADS, DIM = (64, 4), 128
LEVEL = "block"
SAMPLED = 8  # consecutive rows, in the middle and at the end, that hsgen is checked on
TOLERANCE = 1e-2  # |theirs - ours| / |ours|, and |ours - reference| / |reference|; bf16 outputs
SAME = 0.9  # of hsgen's choice that a peer has to make too; the share is written down
SECONDS = 0.2  # of timing, a measurement
AHEAD = 8192  # tokens that everything is compiled on, ahead of the run

Tensors = dict[str, Tensor]
Selected = dict[str, ListSelection]
Made = TypeVar("Made")


class LostError(Exception):
    """The device answers no more: no figure can follow in this process."""


# --- cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One spec, without its window, at one length on one kind of input."""

    system: str
    tokens: int
    kind: samples.Kind
    heads: tuple[int, int]
    dim: int

    @property
    def name(self) -> str:
        """The key of its record."""
        return f"{self.system}/{self.tokens}/{self.kind}"

    @property
    def spec(self) -> Spec:
        """The compressed and the selected branch, gated."""
        query, kv = self.heads
        whole = standins.bind(load(self.system), query=query, kv=kv, dim=self.dim)
        branches = tuple(branch for branch in whole.attend if branch.over)
        named = f"{whole.name}_without_window"
        return verify(whole.model_copy(update={"name": named, "attend": branches}))

    @property
    def level(self) -> str:
        """The level whose selection is attended raw."""
        return LEVEL

    @property
    def selected(self) -> Spec:
        """The selected branch alone, for a selection that is given."""
        return baselines.selected_only(self.spec, self.level)

    def facts(self) -> Json:
        """What the record of the case says beside its steps."""
        return {
            "system": self.system,
            "tokens": self.tokens,
            "inputs": self.kind,
            "heads": list(self.heads),
            "head_dim": self.dim,
            "dtype": "bf16",
            "batch": 1,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """Where and on what cases run.

    Attributes:
        loaded: modules of peers, or why there is none, by name.
    """

    device: str
    seconds: float
    groups: Sequence[Group]
    journal: speed.Journal
    sources: Path
    peers: Sequence[str]
    loaded: dict[str, object] = field(default_factory=dict)

    def sets(self, case: Case) -> list[Tensors]:
        """Enough sets that no call finds its inputs in the cache."""
        first = self._make(case, 0)
        few = samples.size_in_bytes(first) >= samples.ROTATED or self.device == "cpu"
        return [first, *(self._make(case, n) for n in range(1, 1 if few else samples.SETS))]

    def _make(self, case: Case, seed: int) -> Tensors:
        """One set of inputs; the position of values, which no peer has, is 0."""
        x = samples.make(case.spec, case.kind, case.tokens, self.device, seed, self.groups)
        if "compressed_value_position" in x:
            x["compressed_value_position"].zero_()
        return x

    def time(self, call: timing.Call) -> Json:
        """Milliseconds of a call."""
        return {"ms": dataclasses.asdict(timing.time_calls(call, self.device, self.seconds))}

    def run(self, case: Case, step: str, action: Callable[[], Json]) -> None:
        """Do a step, write down how it ended, and free what it left.

        Raises:
            LostError: it took the device with it.
        """
        try:
            self.journal.run(case.name, step, action)
        finally:
            self._shorten(self.journal.data["cases"][case.name]["steps"].get(step, {}))
            forget(self.device)

    def _shorten(self, entry: Json) -> None:
        """Where a peer's files lie says nothing to anyone else."""
        for key in ("reason", "trace"):
            if key in entry:
                entry[key] = entry[key].replace(f"{self.sources.resolve()}/", "")

    def calls(self, name: str, spec: Spec, x: Tensors) -> peer_kernels.Calls:
        """A peer's calls on a set of inputs; it is imported when it is first asked for.

        Raises:
            Exception: whatever the import said, each time.
        """
        peer = peer_kernels.PEERS[name]
        if name not in self.loaded:
            try:
                checkout = (self.sources / peer.repository.split("/")[1]).resolve()
                self.loaded[name] = peers.imported(checkout, peer.module, peer.bare)
            except Exception as error:  # noqa: BLE001 - of code that is not ours
                self.loaded[name] = error
        module = self.loaded[name]
        if isinstance(module, Exception):
            raise module
        return peer.make(module, spec, x)  # type: ignore[arg-type]


def forget(device: str) -> None:
    """Free memory.

    Raises:
        LostError: the device answers no more.
    """
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise LostError(str(error)) from error


# --- hsgen


def run_hsgen(setting: Setting, case: Case, sets: Sequence[Tensors]) -> list[Selected]:
    """Check and time the whole of it, choosing, and attending.  -> its choice on every set"""
    kernel, alone = hsgen.load_kernel(case.spec), hsgen.load_kernel(case.selected)
    parts = [parts_of(case.selected, x) for x in sets]
    chosen = [kernel.select(**x) for x in sets]

    def whole() -> Json:
        o = kernel(**sets[0])
        error = off_reference(case.spec, sets[0], o, chosen[0])
        timed = setting.time(lambda n: kernel(**sets[n % len(sets)])) | {"error": error}
        return timed | {"configs": measure.configs(kernel, case.tokens)}

    def attend() -> Json:
        o = alone(**parts[0], selection=chosen[0])
        error = off_reference(case.selected, parts[0], o, chosen[0])
        timed = setting.time(
            lambda n: alone(**parts[n % len(sets)], selection=chosen[n % len(sets)])
        )
        return timed | {"error": error}

    setting.run(case, "hsgen whole", whole)
    setting.run(
        case, "hsgen choose", lambda: setting.time(lambda n: kernel.select(**sets[n % len(sets)]))
    )
    if case.system in ATTENDED:
        setting.run(case, "hsgen attend", attend)
    return chosen


def parts_of(spec: Spec, x: Tensors) -> Tensors:
    """Those tensors that a spec reads."""
    return {name: x[name] for name in tensor_shapes(spec, 1, 1, 1)}


def off_reference(spec: Spec, x: Tensors, o: Tensor, selection: Selected) -> float:
    """How far some rows are from the float64 reference on the same selection.

    Raises:
        CheckError: further than TOLERANCE, or not finite.
    """
    T, error = o.shape[1], 0.0
    for a in {max(0, T // 2 - SAMPLED // 2), max(0, T - SAMPLED)}:
        b = min(a + SAMPLED, T)
        given = {LEVEL: ListSelection(level=LEVEL, indices=selection[LEVEL].indices[:, a:b])}
        part = standins.rows_of(spec, x, a, b)
        expected = reference(spec, part, selection=given, keep_scores=False).o
        error = max(error, near(o[:, a:b], expected, "from the reference"))
    return error


def near(o: Tensor, expected: Tensor, whence: str) -> float:
    """|o - expected| / |expected|.

    Raises:
        CheckError: more than TOLERANCE, or not finite.
    """
    error = float((o.double() - expected.double()).norm() / expected.double().norm())
    if not error < TOLERANCE:
        raise CheckError(f"off by {error:.3g} {whence}, expected below {TOLERANCE}")
    return error


# --- peers


def run_peer(
    setting: Setting, case: Case, name: str, sets: Sequence[Tensors], chosen: Sequence[Selected]
) -> None:
    """Check and time what a peer has of a case."""
    steps = dict(_steps(setting, case, name, sets, chosen))
    for step, action in steps.items():
        if not setting.journal.done(case.name, step):
            setting.run(case, step, action)


def _steps(
    setting: Setting, case: Case, name: str, sets: Sequence[Tensors], chosen: Sequence[Selected]
) -> Iterator[tuple[str, Callable[[], Json]]]:
    """The steps that make sense, by name."""
    peer = peer_kernels.PEERS[name]

    def every() -> list[peer_kernels.Calls]:
        return [setting.calls(name, case.spec, x) for x in sets]

    if case.system in ATTENDED:
        yield f"{name} attend", lambda: attend(setting, case, every(), sets, chosen)
    if case.system not in peer.systems:
        return
    yield f"{name} compress and choose", lambda: choose(setting, every(), chosen, "compress")
    if name == "fla":  # XunhaoLai's choosing needs the log-sum-exp of its compressed branch
        yield f"{name} choose", lambda: choose(setting, every(), chosen, "choose")
    yield f"{name} whole", lambda: whole(setting, case, every(), sets)


def attend(
    setting: Setting,
    case: Case,
    calls: Sequence[peer_kernels.Calls],
    sets: Sequence[Tensors],
    chosen: Sequence[Selected],
) -> Json:
    """The selected branch on hsgen's selection."""
    given = [c.given(s[LEVEL].indices) for c, s in zip(calls, chosen, strict=True)]
    kernel = hsgen.load_kernel(case.selected)
    ours = kernel(**parts_of(case.selected, sets[0]), selection=chosen[0])
    error = near(calls[0].attend(given[0]), ours, "from hsgen on the same selection")
    del ours
    return setting.time(lambda n: _pick(calls, n).attend(_pick(given, n))) | {"error": error}


def choose(
    setting: Setting, calls: Sequence[peer_kernels.Calls], chosen: Sequence[Selected], way: str
) -> Json:
    """Choosing, which may be after the compressed branch was attended."""
    made = _chosen(calls[0], way)
    own = chosen[0][LEVEL].indices
    share = overlap(calls[0].listed(made)[0], own[0])
    if not share >= SAME:
        raise CheckError(f"{share:.1%} of hsgen's choice is theirs too, expected {SAME:.0%}")
    return setting.time(lambda n: _chosen(_pick(calls, n), way)) | {"same_choice": share}


def whole(
    setting: Setting, case: Case, calls: Sequence[peer_kernels.Calls], sets: Sequence[Tensors]
) -> Json:
    """Both branches; to be compared, hsgen attends to what the peer chose."""
    first = calls[0]
    assert first.whole is not None
    indices = first.listed(_chosen(first, "compress"))
    given = {LEVEL: ListSelection(level=LEVEL, indices=indices)}
    ours = hsgen.load_kernel(case.spec)(**sets[0], selection=given)
    error = near(first.whole(), ours, "from hsgen on the same selection")
    del ours
    return setting.time(lambda n: _called(_pick(calls, n).whole)) | {"error": error}


def overlap(chosen: Tensor, own: Tensor) -> float:
    """Share of one choice that the other has too.  i32[T, Hs, K], twice"""
    entries = int(max(chosen.amax(), own.amax())) + 1
    both = metrics.members(chosen, entries) & metrics.members(own, entries)
    return float(both.sum() / (own >= 0).sum().clamp(min=1))


def _chosen(calls: peer_kernels.Calls, way: str) -> Tensor:
    made = _called(calls.choose if way == "choose" else calls.compress)
    return made if isinstance(made, Tensor) else made[1]


def _called(call: Callable[[], Made] | None) -> Made:
    assert call is not None
    return call()


def _pick(items: Sequence[Made], number: int) -> Made:
    return items[number % len(items)]


# --- dense attention


def run_dense(setting: Setting, case: Case) -> None:
    """Dense causal attention of PyTorch on the same q, k and v, every way; its work is that of any input."""
    variants = baselines.variants(case.spec, setting.device)
    steps = {f"dense {variant.name}": variant for variant in variants}
    if all(setting.journal.done(case.name, step) for step in steps):
        return
    x = setting.sets(case)[0]
    for step, variant in steps.items():
        setting.run(case, step, functools.partial(_dense, setting, variant, x))


def _dense(setting: Setting, variant: baselines.Variant, x: Tensors) -> Json:
    q, k, v = (x[name] for name in ("q", "k", "v"))
    call = baselines.dense(variant, q, k, v)
    error = near(call(0)[:, -1], baselines.last_row(q, k, v), "in the last row")
    flops = baselines.dense_flops(q.shape[1], q.shape[2], q.shape[3], v.shape[3])
    timed = setting.time(call)
    return timed | {"error": error, "tflops": flops / timed["ms"]["median"] / 1e9}


# --- compiling ahead


def compile_ahead(args: argparse.Namespace) -> None:
    """Call everything once on the shortest input, each in a process: the run finds it compiled on disk.

    What fails here, or takes longer than --ahead, is left to the run.
    """
    spawn = multiprocessing.get_context("spawn")
    jobs = [spawn.Process(target=_ahead, args=(args, *job), daemon=True) for job in _jobs(args)]
    with _environment("FLA_CACHE_RESULTS", "0"):  # what is tuned in company is no choice to keep
        for job in jobs:
            job.start()
    deadline = time.monotonic() + args.ahead
    for job in jobs:
        job.join(max(0.0, deadline - time.monotonic()))
        job.kill()
        job.join()


def _jobs(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """System, whose kernels, and which call."""
    jobs = [(system, "hsgen", "") for system in args.systems]
    for name in args.peers:
        systems = peer_kernels.PEERS[name].systems
        ways = ("attend", "choose", "compress") if systems else ("attend",)
        jobs += [((*systems, SYSTEMS[0])[0], name, way) for way in ways]
    return jobs


def _ahead(args: argparse.Namespace, system: str, name: str, way: str) -> None:
    journal = speed.Journal(path=Path(), deadline=0.0)
    setting = _setting(args, journal)
    case = Case(system=system, tokens=AHEAD, kind="random", heads=tuple(args.heads), dim=args.dim)
    x = setting.sets(case)[0]
    kernel, alone = hsgen.load_kernel(case.spec), hsgen.load_kernel(case.selected)
    if name == "hsgen":
        alone(**parts_of(case.selected, x), selection=kernel.select(**x))
        kernel(**x)
        return
    calls = setting.calls(name, case.spec, x)
    if way == "attend":
        blocks = torch.arange(16, dtype=torch.int32, device=args.device)
        calls.attend(calls.given(blocks.expand(1, AHEAD, args.heads[1], -1).contiguous()))
    elif getattr(calls, way):
        _chosen(calls, way)
    torch.cuda.synchronize()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for processes that are started within."""
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


# --- all of it


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every case: hsgen, the peers; dense attention once a length."""
    made = common.provenance("benchmarks.peers_speed", common.without_folders(argv), args.device)
    path = args.output / f"peers_{common.slug(made['card'])}_{made['date']}.json"
    journal = speed.Journal(path=path, deadline=time.monotonic() + args.budget)
    if args.resume:
        journal.data = common.read_json(args.resume)
    versions = {name: _version(name, args.sources) for name in args.peers}
    journal.data["runs"].append(made | {"capture": args.capture.name, "peers": versions})
    setting = _setting(args, journal)
    if args.device == "cuda" and args.ahead:
        compile_ahead(args)
    for case in _cases(args):
        journal.case(case.name, case.facts())
        try:
            _run(
                setting, case, dense=case.system == args.systems[0] and case.kind == args.inputs[0]
            )
        except LostError as error:
            print(f"{case.name}: the device is lost: {error}", flush=True)
            break
        except Exception as error:  # noqa: BLE001 - outside any step: while making inputs, say
            journal.run(case.name, "set-up", functools.partial(_raise, error))
            del error
    common.write_json(path, journal.data)
    return path


def _setting(args: argparse.Namespace, journal: speed.Journal) -> Setting:
    return Setting(
        device=args.device,
        seconds=args.seconds,
        groups=captures.load(args.capture),
        journal=journal,
        sources=args.sources,
        peers=args.peers,
    )


def _run(setting: Setting, case: Case, *, dense: bool) -> None:
    if time.monotonic() < setting.journal.deadline:  # or every step will say that there is no time
        sets = setting.sets(case)
        chosen = run_hsgen(setting, case, sets)
        for name in setting.peers:
            run_peer(setting, case, name, sets, chosen)
        del sets, chosen
        forget(setting.device)
    else:
        setting.run(case, "hsgen whole", dict)
    if dense:
        run_dense(setting, case)


def _raise(error: Exception) -> Json:
    raise error


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    """What all peers have first: nsa itself is another set of keys and values."""
    for system in args.systems:
        for tokens in args.tokens:
            for kind in args.inputs:
                heads = (args.heads[0], args.heads[1])
                yield Case(system=system, tokens=tokens, kind=kind, heads=heads, dim=args.dim)


def _version(name: str, sources: Path) -> Json:
    repository = peer_kernels.PEERS[name].repository
    try:
        return peers.origin(repository, "", sources)[1]
    except Exception as error:  # noqa: BLE001 - its steps say so
        return {"repository": repository, "commit": f"unknown ({type(error).__name__})"}


# --- command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time kernels of peers beside hsgen's.")
    parser.add_argument("--sources", type=Path, help="a folder of the peers' checkouts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument(
        "--inputs", nargs="+", choices=("real", "random"), default=["real", "random"]
    )
    names = tuple(peer_kernels.PEERS)
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--heads", type=int, nargs=2, default=HEADS, help="query and kv")
    parser.add_argument("--dim", type=int, default=DIM, help="of a head")
    parser.add_argument(
        "--capture", type=Path, default=common.SHIPPED_CAPTURE, help="of real heads"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a measurement")
    parser.add_argument(
        "--budget", type=float, default=3600.0, help="seconds, no step begins later"
    )
    parser.add_argument(
        "--ahead", type=float, default=60.0, help="seconds for compiling in processes at the start"
    )
    parser.add_argument("--resume", type=Path, help="results whose finished steps are kept")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--report", type=Path, nargs="*", help="results to write up (default: all)")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.report is None and args.sources is None:
        parser.error("--sources: expected a folder of checkouts, or --report")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results, or write the page from results."""
    args = arguments(argv)
    if args.report is not None:
        results = [common.read_json(path) for path in common.found(args.report, "peers")]
        args.page.write_text(peers_report.page(results))
        print(args.page)
        return 0
    path = run(args, sys.argv[1:] if argv is None else argv)
    print(peers_report.page([common.read_json(path)]))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
