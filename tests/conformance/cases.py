"""The cases of the error test: every pair of group, dtype, length, layout, position, dims and block."""

import torch

from conformance import calls, systems
from conformance.covering import pairwise

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
FACTORS = {
    "group": (1, 3, 7, 16),
    "dtype": ("fp16", "fp32", "bf16"),
    "tokens": ("one", "short", "odd", "whole"),
    "layout": ("dense", "headmajor", "packed", "guarded"),
    "position": ("aligned", "longer", "offset", "padded"),
    "dims": ((32, 32), (64, 32), (80, 64), (96, 96), (192, 128)),
    "block": (8, 16),
}
CASES = pairwise(FACTORS)
FEW = CASES[::8]  # of a spec that only has other numbers than one that meets them all


def case_id(case):
    """G3-fp16-odd-packed-aligned-64x32-block8."""
    dims = "x".join(map(str, case["dims"]))
    words = (case[name] for name in ("dtype", "tokens", "layout", "position"))
    return f"G{case['group']}-{'-'.join(words)}-{dims}-block{case['block']}"


def build(name, case, *, device="cpu", seed=0):
    """The call of a case on a shipped spec."""
    spec = systems.small(
        name, block=case["block"], group=case["group"], dims=case["dims"], causal=True
    )
    return build_of(spec, case, device=device, seed=seed)


def build_of(spec, case, *, device="cpu", seed=0):
    """The call of a case on a spec that has its heads, dims and blocks."""
    T, skipped = _tokens(spec, case), 0
    dtype = DTYPES[case["dtype"]]
    longer = {"aligned": 0, "longer": 37, "offset": 20, "padded": 9}[case["position"]]
    if case["layout"] == "packed":
        lengths = [T // 2, 0, T - T // 2]
        keys = [n + longer for n in lengths]
        call, _ = calls.pack(spec, lengths, key_lengths=keys, dtype=dtype, device=device, seed=seed)
    else:
        B = 2 if T <= case["block"] or case["position"] in ("offset", "padded") else 1
        keys = [T + longer] * B
        skipped = (B - 1) * (T // 2 // case["block"] * case["block"])  # the last rows see the most
        call = calls.make(
            spec, B=B, T=T - skipped, S=keys[0], dtype=dtype, device=device, seed=seed
        )
    call = call.with_options(**_options(case["position"], keys, skipped, device))
    moves = {"headmajor": calls.head_major, "guarded": calls.guarded}
    return calls.placed(call, moves[case["layout"]]) if case["layout"] in moves else call


def _tokens(spec, case):
    """How many queries; few where a level of tokens costs a program a row."""
    block = case["block"]
    many = 6 * block if block == 8 else 5 * block
    if any(level.within for level in spec.levels):
        many = 32 if block == 8 else 48
    return {"one": 1, "short": block - 1, "odd": many - 3, "whole": many}[case["tokens"]]


def _options(position, keys, skipped, device):
    """Where queries lie, one number a sequence."""
    if position == "offset":
        offsets = torch.arange(len(keys)) * 9 + 5 + skipped
        return {"q_offset": offsets.to(torch.int32).to(device)}
    if position == "padded":
        lens = torch.tensor([n - 3 * z for z, n in enumerate(keys)])
        return {"kv_lens": lens.to(torch.int32).to(device)}
    return {}
