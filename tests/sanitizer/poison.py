"""Values that nobody computes: what torch.empty leaves, and what masked lanes hold without `other`."""

import contextlib

import numpy as np
import torch
import triton.language as tl

# A NaN, and an integer far out of any range, with bits that arithmetic does not produce.
PATTERNS = {2: 0x7FDB, 4: 0x7FDBADCB, 8: 0x7FFBADCBADCBADCB}
SMALL_INTEGER = 0x5B
# Filling touches the memory; tests of 64-bit offsets only reserve theirs.
LARGEST_FILLED = 1 << 26
CREATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_recognised = False


@contextlib.contextmanager
def poisoned_empty(fill="nan"):
    """Fill what torch.empty and its kin return: with `nan` (large integers) or with `seven`.

    A result that nobody wrote differs between the two.  Under `nan` the sanitizer also reports
    kernels that load it.
    """
    global _recognised
    if fill not in ("nan", "seven"):
        raise ValueError(f"fill must be 'nan' or 'seven', got {fill!r}")
    old = [(owner, name, getattr(owner, name)) for owner, name in CREATORS]
    before = _recognised
    for owner, name, create in old:
        setattr(owner, name, _filling(create, fill))
    _recognised = fill == "nan"
    try:
        yield
    finally:
        _recognised = before
        for owner, name, create in old:
            setattr(owner, name, create)


def _filling(create, fill):
    def creator(*args, **kwargs):
        made = create(*args, **kwargs)
        if 0 < made.numel() <= LARGEST_FILLED and made.layout == torch.strided:
            _fill(made.detach(), fill)
        return made

    return creator


def _fill(made, fill):
    size = made.element_size()
    if fill == "seven":
        made.fill_(7)
    elif made.is_complex() or made.dtype == torch.bool:
        made.fill_(True)
    elif size == 1:
        made.view(torch.int8).fill_(0x7F if made.is_floating_point() else SMALL_INTEGER)
    else:
        made.view(SIGNED[size]).fill_(PATTERNS[size])


def is_poison(data, active):
    """How many active lanes hold the pattern of an unwritten element."""
    size = data.dtype.itemsize
    if not _recognised or size == 1 or (size == 2 and data.dtype == np.int16):
        return 0
    hits = data.view(f"u{size}") == PATTERNS[size]
    return np.count_nonzero(hits & active) if np.count_nonzero(hits) else 0


def poison_masked_lanes(data, active, dtype):
    """`data` with NaN, True or a large integer in the inactive lanes."""
    out = np.array(data)
    if dtype.is_floating():
        size = out.dtype.itemsize
        # e5m2 and e4m3 both read 0x7f as NaN; bf16 is kept as an unsigned integer.
        value = (
            np.uint8(0x7F) if size == 1 else np.uint16(0x7FC0) if dtype == tl.bfloat16 else np.nan
        )
    elif out.dtype == np.bool_:
        value = True
    else:
        value = np.iinfo(out.dtype).max // 3
    out[~active] = value
    return out
