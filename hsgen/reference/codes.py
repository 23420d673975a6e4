"""Vectors as codes: product quantisation, and how many codes of two vectors are equal."""

from __future__ import annotations

from torch import Tensor

from hsgen.spec import Codes


def code_matches(codes: Codes, q: Tensor, keys: Tensor, codebook: Tensor) -> Tensor:
    """Equal codes, or their bucket.  [T, Hq, D], [N, Hkv, D], [runs, words, dim] -> [T, Hq, N]"""
    of_q = encode(codes, q, codebook)  # [T, Hq, runs]
    of_keys = encode(codes, keys, codebook)  # [N, Hkv, runs]
    of_keys = of_keys.repeat_interleave(q.shape[1] // keys.shape[1], 1).transpose(0, 1)
    count = (of_q.unsqueeze(2) == of_keys).sum(-1)
    if codes.buckets is not None:
        count = (count // (len(codebook) // codes.buckets)).clamp(max=codes.buckets - 1)
    return count.to(q.dtype)


def encode(codes: Codes, x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword of every run of channels; ties go to the lower.  [..., D] -> i64[..., runs]"""
    away = x.unflatten(-1, (-1, 1, codes.dim)) - codebook
    distance = away.abs() if codes.distance == "l1" else away.square()
    return distance.sum(-1).argmin(-1)
