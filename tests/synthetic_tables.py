"""Tables of a part's points made by a formula: no card ever said these times.

The formula has what makes such spaces hard: waves of programs, a pipeline that hides latency as far
as shared memory lets it, registers that spill, tiles that waste rows, roughness, failures.
"""

import math
import zlib

from hsgen.measurer import Table, names_of
from hsgen.rows import RowsContext
from hsgen.space import Part, Point, Variant
from hsgen.target import H100

ROUGH = 0.03
TOKENS = 32768


def table(variant: Variant, part: Part, *, seed: int = 0) -> Table:
    """Every point of a part."""
    entries = {}
    names = names_of(part)
    for point in part.points(variant.start):
        known = point.keywords()
        values = tuple(known[k][n] for k, n in (name.split(".") for name in names))
        entries[values] = entry(variant, part, point, seed)
    return Table(
        about=f"SYNTHETIC: {part.name} by a formula, not by a card",
        synthetic=True,
        made={},
        spec=variant.plan.name,
        orders=dict(variant.orders),
        part=part.name,
        shape="32K",
        names=names,
        entries=entries,
    )


def entry(variant: Variant, part: Part, point: Point, seed: int) -> float | str:
    """Microseconds, or the class of a failure."""
    total = 0.0
    for name in part.kernels:
        kernel, values = variant.plan.kernel(name), point.config(name).keywords()
        if isinstance(kernel.context, RowsContext) and "BLOCK_T" in values:
            found = rows_time(kernel.context, values)
        else:
            found = other_time(values)
        if isinstance(found, str):
            return found
        total += found
    noise = zlib.crc32(f"{seed} {point.key}".encode()) / 2**32
    if noise > 0.98 and point != variant.start:
        return "WRONG_NUMERIC"
    return total * (1 + ROUGH * noise)


def rows_time(context: RowsContext, values) -> float | str:
    rows, width, warps, stages = (
        values[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    )
    qk = sum(c.width for c in context.qk_chunks)
    v = sum(c.width for c in context.v_chunks)
    shared = 2 * (rows * qk + max(1, stages - 1) * width * (qk + v)) + 4 * rows * width
    if shared > H100.smem_per_block:
        return "OVER_SMEM"
    held = (rows * (v + width)) / (32 * warps)
    resident = max(1, min(H100.smem_per_sm // shared, 65536 // (32 * warps * min(255, 56 + held))))
    tokens = values["BLOCK_T"]
    programs = TOKENS / tokens * 4
    waves = math.ceil(programs / (H100.sms * resident))
    useful = tokens * context.pitch / rows
    keys = 1024 * (1 + 0.25 * math.log2(tokens))  # neighbours choose alike, not the same
    steps = keys / width
    math_time = rows * width * (qk + v) * 2 / (4e6 * min(1.0, rows / 64) * min(1.0, width / 64))
    latency = 0.9 / (1 + 0.7 * (stages - 1) + 0.5 * (resident - 1))
    step = max(math_time * resident, latency) + 0.05 + 0.02 * warps
    spill = 1 + max(0.0, held - 130) / 60
    return waves * (1.5 + steps * step * spill) / (0.4 + 0.6 * useful)


def other_time(values) -> float:
    """A kernel beside: best somewhere in the middle."""
    off = [abs(math.log2(x) - 5) for name, x in values.items() if name.startswith("BLOCK_")]
    return 20.0 * (1 + 0.08 * sum(off) + 0.1 * abs(math.log2(values["num_warps"]) - 2))
