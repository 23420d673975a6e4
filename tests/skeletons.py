"""Emitted kernels on their own, and the sequences they are told of."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import torch

from hsgen import emit
from hsgen.plan import Config, Kernel

PROVENANCE = emit.Provenance(version="0", spec="test", digest="0" * 64, target="test")


def emitted(skeleton, context):
    """The text of a kernel's module."""
    config = Config(constexprs=(), num_warps=4, num_stages=1)
    kernel = Kernel(
        name=context.name, skeleton=skeleton, context=context, config=config, operators=()
    )
    return emit.render_kernel(kernel, PROVENANCE)


def kernel(skeleton, context, folder):
    """The kernel itself, from a module written to `folder`."""
    path = folder / f"{context.name}.py"
    path.write_text(emitted(skeleton, context), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(context.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, context.name)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Queries and keys of each sequence; dense ones are padded to the longest, packed ones follow on."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    packed: bool = False
    offsets: tuple[int, ...] | None = None  # None: bottom-right aligned

    def __len__(self):
        return len(self.q_lens)

    @property
    def tokens(self):
        """Length of the query tensors' second dimension."""
        return sum(self.q_lens) if self.packed else max(self.q_lens)

    @property
    def keys(self):
        """Length of the key tensors' second dimension."""
        return sum(self.k_lens) if self.packed else max(self.k_lens)

    @property
    def batch(self):
        return 1 if self.packed else len(self)

    @property
    def rows(self):
        return self.batch * self.tokens

    @cached_property
    def table(self):
        """int32[Z, 6]: q_start, q_first, q_len, q_offset, k_first, k_len."""
        table, q, k = [], 0, 0
        offsets = self.offsets or [b - a for a, b in zip(self.q_lens, self.k_lens, strict=True)]
        for z, (q_len, k_len) in enumerate(zip(self.q_lens, self.k_lens, strict=True)):
            first = (q, q, k) if self.packed else (z * self.tokens, 0, 0)
            table.append((first[0], first[1], q_len, offsets[z], first[2], k_len))
            q, k = q + q_len, k + k_len
        return torch.tensor(table, dtype=torch.int32)

    def tiles(self, block):
        return self.rows // block + len(self)

    def tile(self, number, block):
        """The sequence and first row of a tile; None where the tile is empty."""
        starts = [row[0] // block + z for z, row in enumerate(self.table.tolist())]
        z = max(z for z, start in enumerate(starts) if start <= number)
        t0 = (number - starts[z]) * block
        return (z, t0) if t0 < self.q_lens[z] else None


def complete(position, k_len, *, size, stride, causal, short):
    """How many entries are complete, by looking at each."""

    def done(e):
        if causal:
            return e * stride + size - 1 <= position and e * stride + size <= k_len
        return e * stride < k_len if short else e * stride + size <= k_len

    return sum(done(e) for e in range(k_len // stride + 2))


def forced(position, k_len, *, stride, first, last, causal):
    """The forced entries of a row, ascending."""
    own = position // stride
    wanted = {*range(first), *range(own - last + 1, own + 1)}
    return sorted(e for e in wanted if e >= 0 and e * stride < k_len and (not causal or e <= own))
