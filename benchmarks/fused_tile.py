"""NSA's choice and what follows it in one program, an experiment, beside the launches that hsgen plans.

    python -m benchmarks.fused_tile --capture FILE -o OUT

A program takes some neighbouring tokens of a key head with all of its query heads.  By the log-sum-exp of the
compressed branch it scores compressed keys, sums over heads and maps to blocks; scores of its rows stay in a
piece of scratch that it has for itself, from which it takes the best 16 of each row, exactly, in the order of
the design.  It unites them, attends to the union and then to the window, weighs both by their gates, adds
what the compressed branch left, and writes the output once.  So of NSA's eight launches three remain, before
it: the pools, and the compressed branch.  Needs a GPU; choices and outputs are checked before they are timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import hsgen
from benchmarks import common
from benchmarks.common import Json
from hsgen import captures, checking, samples, timing
from hsgen.rows import next_power
from hsgen.samples import Kind
from hsgen.spec import Spec, load
from templates.pieces.order import rank_key
from templates.pieces.score import (
    head_of,
    sum_heads,
    token_at,
    token_of,
)
from templates.pieces.select import (
    bisect_start,
    count_keys,
    missing_ties,
    narrow,
    quarter_step,
    quarters,
)
from templates.pieces.softmax import natural_lse, reciprocal_or_zero, softmax_step
from templates.pieces.tile import load_gates, load_queries, load_tile_masked
from templates.pieces.visible import complete_limit, is_forced

TOKENS = (8192, 131072, 32768)
PARTS = ("scores", "choice")  # what comes before attending, each timed with those before
PARTS_AT = 32768  # tokens
ALIKE = 2e-2  # of outputs that chose for themselves, in bf16
CHOSEN = 0.998  # of blocks that both choose: last bits of scores differ, as heads are summed in other orders
# what one launch takes the place of
AFTER = ("score", "rank", "index", "attend_selected", "attend_window")


@triton.jit
def taken_keys(key, wanted):
    """The `wanted` greatest keys of each row, lower columns first.  key: [R, N] -> bool[R, N]"""
    candidates, forced = count_keys(key)
    low, high, above = bisect_start(candidates, forced, wanted)
    low, high = narrow(low, high, key)
    first, middle, last = quarters(low, high)
    while tl.max((middle != low).to(tl.int32), 0) > 0:
        # three counts in one sum, as warps wait for one another in each
        more = (key >= first[:, None]).to(tl.int64) + ((key >= middle[:, None]).to(tl.int64) << 20)
        more = tl.sum(more + ((key >= last[:, None]).to(tl.int64) << 40), 1)
        a, b, c = more & 0xFFFFF, more >> 20 & 0xFFFFF, more >> 40
        a, b, c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
        low, high, above = quarter_step(low, high, above, first, middle, a, b, c, wanted)
        first, middle, last = quarters(low, high)
    ties = missing_ties(low, high, above, wanted)
    taken = (key >= high[:, None]).to(tl.int32)
    if tl.max(ties, 0) > 0:
        tie = (key == low[:, None]).to(tl.int32) * (1 - taken)
        taken += tie * (tl.cumsum(tie, 1) <= ties[:, None]).to(tl.int32)
    return taken


@triton.jit(do_not_specialize=["tokens", "items"])
def fused_tile(
    Q,  # [T, Hq, D0 + D1]
    K,  # [T, H, D0 + D1]
    V,  # [T, H, DV]
    K_WINDOW,  # [T, H, D0 + D1]
    V_WINDOW,  # [T, H, DV]
    COMPRESSED,  # [entries, H, D0 + D1] keys
    GATES,  # [T, Hq, 3]
    LSE,  # f32[Hq, T] of the compressed branch
    BEFORE,  # [T, Hq, DV] what the compressed branch left
    O,  # [T, Hq, DV]
    LSE_SELECTED,  # f32[Hq, T]
    LSE_WINDOW,  # f32[Hq, T]
    SELECTION,  # i32[T, H, KEPT]
    SCORES,  # f32[programs, BLOCK_T * (BLOCK // STRIDE + 1) * WIDTH] of entries, then of blocks
    ENTRIES,  # i32[programs, BLOCK_T * KEPT] blocks of the union
    WORDS,  # i32[programs, BLOCK_T * KEPT] the rows that chose each
    tokens,  # T
    items,  # tiles of all key heads
    SCALE_LOG2: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    SIZE: tl.constexpr,  # tokens of a compressed entry
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a block
    KEPT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,  # blocks of a row, at most
    BLOCK_T: tl.constexpr,  # tokens a tile
    BLOCK_C: tl.constexpr,  # compressed keys a step
    BLOCK_N: tl.constexpr,  # keys a step of the window
    UNTIL: tl.constexpr,  # 3: all; 1: scores alone, 2: the choice too
):
    M: tl.constexpr = BLOCK_T * GROUP
    HQ: tl.constexpr = H * GROUP
    DQ: tl.constexpr = D0 + D1
    RATIO: tl.constexpr = BLOCK // STRIDE
    PART: tl.constexpr = min(WIDTH, 256)  # blocks that are mapped at a time
    MOST: tl.constexpr = BLOCK_T * KEPT
    program = tl.program_id(0)
    scratch = SCORES + program.to(tl.int64) * (BLOCK_T * (RATIO + 1) * WIDTH)
    mapped = scratch + BLOCK_T * RATIO * WIDTH
    entries = ENTRIES + program * MOST
    words = WORDS + program * MOST
    tiles = items // H
    rows = tl.arange(0, M)
    token_in_tile = token_of(rows, BLOCK_T, GROUP)
    for item in range(program, items, tl.num_programs(0)):
        # rows: tiles of one key head follow one another, the longest first
        head = item // tiles
        t0 = (tiles - 1 - item % tiles) * BLOCK_T
        token = t0 + token_in_tile
        row_head = head * GROUP + head_of(rows, BLOCK_T, GROUP)
        alive = token < tokens
        last = tl.minimum(t0 + BLOCK_T, tokens) - 1
        q0 = load_queries(Q, token, HQ * DQ, row_head, DQ, alive, 0, D0)
        q1 = load_queries(Q, token, HQ * DQ, row_head, DQ, alive, D0, D1)

        # score: compressed keys, summed over heads, mapped to blocks
        lse = tl.load(LSE + row_head * tokens + token, mask=alive, other=float("inf"))
        lse *= 1.4426950408889634
        stop = complete_limit(last, tokens, SIZE, STRIDE, True, False)
        blocks = complete_limit(last, tokens, BLOCK, BLOCK, True, False)
        complete = complete_limit(token, tokens, SIZE, STRIDE, True, False)
        scored = token_at(tl.arange(0, BLOCK_T), BLOCK_T, GROUP)
        for n0 in range(0, blocks * RATIO, BLOCK_C):
            n = n0 + tl.arange(0, BLOCK_C)
            inside = n < stop
            k0 = load_tile_masked(COMPRESSED + head * DQ, n, inside, H * DQ, 0, D0)
            k1 = load_tile_masked(COMPRESSED + head * DQ, n, inside, H * DQ, D0, D1)
            s = tl.dot(k0, tl.trans(q0), input_precision="tf32x3")
            s = tl.dot(k1, tl.trans(q1), s, input_precision="tf32x3")
            value = tl.exp2(s * SCALE_LOG2 - lse[None, :])
            value = tl.where(n[:, None] < complete[None, :], value, 0.0)
            each = sum_heads(value, BLOCK_T, GROUP)
            address = scratch + scored[None, :] * WIDTH * RATIO + n[:, None]
            tl.store(address, each, mask=(n < blocks * RATIO)[:, None])
        tl.debug_barrier()

        if UNTIL >= 2:
            # map: a block has its own entries and the last ones before it
            row = tl.arange(0, BLOCK_T)[:, None]
            for e0 in range(0, blocks, PART):
                e = e0 + tl.arange(0, PART)[None, :]
                n = e * RATIO
                address = scratch + row * (WIDTH * RATIO) + n
                there = e < blocks
                score = tl.zeros([BLOCK_T, PART], tl.float32)
                for i in tl.static_range(0, RATIO):
                    weight = min(SIZE // STRIDE, RATIO - i)
                    score += tl.load(address + i, mask=there, other=0.0) * weight
                for i in tl.static_range(1, SIZE // STRIDE):
                    handed = tl.load(address - i, mask=there & (n >= i), other=0.0)
                    score += handed * min(SIZE // STRIDE - i, RATIO)
                tl.store(mapped + row * WIDTH + e, score, mask=there)
            tl.debug_barrier()

            # choose: the best blocks of each row
            e = tl.arange(0, WIDTH)[None, :]
            position = t0 + row
            k_len = tl.where(position < tokens, tokens, 0)
            there = e < complete_limit(position, k_len, BLOCK, BLOCK, True, False)
            forced = is_forced(e, position, k_len, BLOCK, FIRST, LAST, True)
            score = tl.load(mapped + row * WIDTH + e, mask=there & (forced == 0), other=0.0)
            taken = taken_keys(rank_key(score, there, forced), KEPT)
            place = tl.cumsum(taken, 1) - 1
            chosen = SELECTION + (position.to(tl.int64) * H + head) * KEPT
            tl.store(chosen + place, e + row * 0, mask=taken > 0)
            slot = tl.arange(0, KEPT)[None, :]
            empty = (slot >= tl.sum(taken, 1)[:, None]) & (position < tokens)
            tl.store(chosen + slot, slot * 0 - 1, mask=empty)

            # unite: each block once, with the rows that chose it
            member = tl.sum(taken << row, 0)
            some = (member > 0).to(tl.int32)
            place = tl.cumsum(some, 0) - 1
            count = tl.sum(some, 0)
            e = tl.arange(0, WIDTH)
            tl.store(entries + place, e, mask=some > 0)
            tl.store(words + place, member, mask=some > 0)
            tl.debug_barrier()

        if UNTIL >= 3:
            # attend: the union
            m = tl.full([M], float("-inf"), tl.float32)
            l = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, DV], tl.float32)
            entry = tl.load(entries)
            for i in range(0, count):
                n = entry * BLOCK + tl.arange(0, BLOCK)
                word = tl.load(words + i)
                entry = tl.load(entries + i + 1, mask=i + 1 < count, other=0)
                inside = n < tokens
                limit = tl.where((word >> token_in_tile) & 1 > 0, token + 1, 0)
                k0 = load_tile_masked(K + head * DQ, n, inside, H * DQ, 0, D0)
                k1 = load_tile_masked(K + head * DQ, n, inside, H * DQ, D0, D1)
                s = tl.dot(q0, tl.trans(k0), input_precision="tf32x3")
                s = tl.dot(q1, tl.trans(k1), s, input_precision="tf32x3")
                s = tl.where(n[None, :] < limit[:, None], s, float("-inf"))
                p, m, l, rescale = softmax_step(s, m, l, SCALE_LOG2)
                v = load_tile_masked(V + head * DV, n, inside, H * DV, 0, DV)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
            total = reciprocal_or_zero(l)
            total *= load_gates(GATES + 1, token, HQ * 3, row_head, 3, alive)
            before = load_queries(BEFORE, token, HQ * DV, row_head, DV, alive, 0, DV)
            before = (before.to(tl.float32) + acc * total[:, None]).to(O.dtype.element_ty)
            tl.store(LSE_SELECTED + row_head * tokens + token, natural_lse(m, l), mask=alive)

            # attend: the window
            m = tl.full([M], float("-inf"), tl.float32)
            l = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, DV], tl.float32)
            for n0 in range(tl.maximum(t0 - WINDOW + 1, 0) // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                inside = n < tokens
                k0 = load_tile_masked(K_WINDOW + head * DQ, n, inside, H * DQ, 0, D0)
                k1 = load_tile_masked(K_WINDOW + head * DQ, n, inside, H * DQ, D0, D1)
                s = tl.dot(q0, tl.trans(k0), input_precision="tf32x3")
                s = tl.dot(q1, tl.trans(k1), s, input_precision="tf32x3")
                near = (n[None, :] <= token[:, None]) & (n[None, :] > token[:, None] - WINDOW)
                s = tl.where(near, s, float("-inf"))
                p, m, l, rescale = softmax_step(s, m, l, SCALE_LOG2)
                v = load_tile_masked(V_WINDOW + head * DV, n, inside, H * DV, 0, DV)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
            total = reciprocal_or_zero(l)
            total *= load_gates(GATES + 2, token, HQ * 3, row_head, 3, alive)
            o = (before.to(tl.float32) + acc * total[:, None]).to(O.dtype.element_ty)
            columns = tl.arange(0, DV)
            address = (token.to(tl.int64) * HQ + row_head)[:, None] * DV + columns[None, :]
            tl.store(O + address, o, mask=alive[:, None])
            tl.store(LSE_WINDOW + row_head * tokens + token, natural_lse(m, l), mask=alive)


# --- calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a program works: tokens, keys of a step, warps, stages, programs a processor."""

    tokens: int
    compressed: int
    keys: int
    warps: int
    stages: int
    programs: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.warps} warps, {self.stages} stages, {self.programs} a processor"


TILES = (
    Tile(tokens=8, compressed=128, keys=64, warps=8, stages=3, programs=1),
    Tile(tokens=4, compressed=64, keys=64, warps=4, stages=2, programs=2),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One launch: what it reads, its scratch and what it puts out."""

    pointers: tuple[Tensor, ...]
    constants: dict[str, Any]
    tokens: int
    items: int
    programs: int
    o: Tensor
    lse: dict[str, Tensor]
    selection: Tensor
    scratch: int  # bytes

    def __call__(self) -> None:
        """Launch."""
        fused_tile[(self.programs,)](*self.pointers, self.tokens, self.items, **self.constants)


def constants(spec: Spec, tokens: int, tile: Tile) -> dict[str, Any]:
    """What the kernel is compiled for."""
    compressed, block = spec.levels
    assert spec.heads is not None
    assert spec.head_dim is not None
    assert block.select is not None
    qk, v = spec.head_dim.qk, spec.head_dim.v
    first = 1 << qk.bit_length() - 1
    return {
        "SCALE_LOG2": qk**-0.5 * 1.4426950408889634,
        "H": spec.heads.kv,
        "GROUP": spec.heads.group,
        "D0": first if first < qk else qk // 2,
        "D1": qk - first if first < qk else qk // 2,
        "DV": v,
        "SIZE": compressed.partition.size,
        "STRIDE": compressed.partition.stride,
        "BLOCK": block.partition.size,
        "KEPT": block.select.top_k,
        "FIRST": block.select.force.first,
        "LAST": block.select.force.last,
        "WINDOW": spec.attend[2].window,
        "WIDTH": max(32, next_power(-(-tokens // block.partition.size))),
        "BLOCK_T": tile.tokens,
        "BLOCK_C": tile.compressed,
        "BLOCK_N": tile.keys,
        "UNTIL": 3,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def prepare(kernel: hsgen.Kernel, x: dict[str, Tensor], tile: Tile, processors: int) -> Call:
    """A call on tensors of one sequence; what comes before it, hsgen's launches make.

    Args:
        kernel: Of nsa, or of a spec like it.
        x: Its tensors, contiguous.
        tile: How programs work.
        processors: Of the GPU.
    """
    spec = kernel.spec
    of = constants(spec, x["q"].shape[1], tile)
    tokens, heads, dtype = x["q"].shape[1], of["H"] * of["GROUP"], x["q"].dtype
    alone = x["gates"].clone()
    alone[..., 1:] = 0  # what other branches then add is 0, and changes no bit
    before, lse = kernel(**{**x, "gates": alone}, return_lse=True)
    cache = kernel.new_cache(1, tokens, dtype, x["q"].device)
    cache.append(**{n: y for n, y in x.items() if n not in ("q", "gates")})
    items = -(-tokens // tile.tokens) * of["H"]
    programs = min(items, tile.programs * processors)

    def made(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=before.device)

    o, selection = torch.empty_like(before), made(tokens, of["H"], of["KEPT"], dtype=torch.int32)
    lses = [made(heads, tokens, dtype=torch.float32) for _ in range(2)]
    slots = (of["BLOCK"] // of["STRIDE"] + 1) * of["WIDTH"]
    scores = made(programs, tile.tokens, slots, dtype=torch.float32)
    lists = [made(programs, tile.tokens * of["KEPT"], dtype=torch.int32) for _ in range(2)]
    read = [x[n] for n in ("q", "k", "v", "k_window", "v_window")]
    read += [cache.tensors["compressed.keys"], x["gates"], lse["compressed"], before]
    assert all(each.is_contiguous() for each in read)
    return Call(
        pointers=(*read, o, *lses, selection, scores, *lists),
        constants=of,
        tokens=tokens,
        items=items,
        programs=programs,
        o=o,
        lse={"selected": lses[0], "window": lses[1]},
        selection=selection,
        scratch=sum(each.nbytes for each in (scores, *lists)),
    )


def differences(call: Call, o: Tensor, lse: dict[str, Tensor], chosen: Tensor) -> Json:
    """How far a call's results are from hsgen's.

    Args:
        call: That was launched.
        o: [1, T, Hq, Dv] of hsgen.
        lse: By branch, f32[1, Hq, T].
        chosen: i32[1, T, H, K].
    """
    ours, theirs = call.selection, chosen[0]
    both = (ours[..., :, None] == theirs[..., None, :]) & (ours >= 0)[..., None]
    same = (ours == theirs).all(-1)
    rows = same.all(-1)  # of tokens whose heads all choose alike
    return {
        "error": checking.relative(call.o, o),
        "error_of_same": checking.relative(call.o[0, rows], o[0, rows].double()),
        "lse": float((call.lse["window"] - lse["window"][0]).abs().max()),
        "rows_alike": float(same.float().mean()),
        "chosen_by_both": float(both.sum() / (theirs >= 0).sum()),
    }


# --- measuring


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every length; results are on disk after each launch that was timed."""
    made = common.provenance("benchmarks.fused_tile", argv, "cuda")
    path = args.output / f"fused_tile_{common.slug(made['card'])}_{made['date']}.json"
    groups = captures.load(args.capture)
    data: Json = {"runs": [made], "cases": {}}
    for tokens in args.tokens:
        found = data["cases"][f"{tokens}/{args.inputs}"] = {}
        with torch.no_grad():
            for name, each in results(tokens, args.inputs, groups):
                found[name] = each
                common.write_json(path, data)
                print(tokens, name, said(each), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return path


def results(
    tokens: int, kind: Kind, groups: Sequence[captures.Group]
) -> Iterator[tuple[str, Json]]:
    """hsgen's launches, checked and timed; then every tile, and the parts of the first one."""
    spec = load("nsa")
    x = samples.make(spec, kind, tokens, "cuda", 0, groups)
    x = {n: y.contiguous() for n, y in x.items()}
    kernel = hsgen.load_kernel(spec)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    o, lse = kernel(**x, return_lse=True)
    selection = kernel.select(**x)

    def launches() -> Json:
        found = checking.compare(spec, x, o, selection, checking.sampled(spec, tokens))
        times = timing.kernel_times(lambda _: kernel(**x))
        after = sum(ms for n, ms in times.items() if n.startswith(AFTER))
        return found | {"ms": after, "whole": sum(times.values()), "kernels": times}

    def fused(tile: Tile) -> Json:
        call = prepare(kernel, x, tile, processors)
        call()
        found = differences(call, o, lse, selection["block"].indices)
        if not (found["error"] < ALIKE and found["chosen_by_both"] > CHOSEN):
            raise checking.CheckError(f"unlike hsgen's launches: {found}")
        return found | {"ms": _milliseconds(call), "scratch": call.scratch}

    def parts() -> Json:
        call = prepare(kernel, x, TILES[0], processors)
        return {
            part: _milliseconds(replace(call, constants=call.constants | {"UNTIL": until}))
            for until, part in enumerate(PARTS, start=1)
        }

    yield "hsgen", checking.attempt(launches)
    for tile in TILES:
        yield str(tile), checking.attempt(lambda tile=tile: fused(tile))
    if tokens == PARTS_AT:
        yield "parts", checking.attempt(parts)


def _milliseconds(call: Call) -> float:
    """Of the launch."""
    return timing.kernel_times(lambda _: call())["fused_tile"]


def said(found: Json) -> str:
    """The figures of one step."""
    if found["status"] != "ok":
        return found["reason"]
    return ", ".join(f"{n} {x:.5g}" for n, x in found.items() if isinstance(x, float))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write results."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--inputs", choices=("real", "random"), default="real")
    parser.add_argument("--capture", type=Path, default=common.SHIPPED_CAPTURE)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    print(run(parser.parse_args(words), words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
