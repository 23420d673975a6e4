"""A small language model whose attention a spec describes: python examples/language_model.py

Runs on CPU tensors.  benchmarks/training_run.py trains it with several specs and writes up what they learnt.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hsgen
from hsgen.perplexity import manual
from hsgen.reference import reference, tensor_kinds, tensor_shapes
from hsgen.spec import HeadDim, Heads, Spec, load

BASE = 10_000.0  # of rotary embeddings
WEIGHTS = {"kl": 1.0, "distill": 1.0, "dual_entropy": 0.01}  # of a spec's losses beside the model's


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a model.

    Attributes:
        vocabulary: Bytes, or the tokens of another task.
        heads: Of queries, and of keys.
    """

    vocabulary: int = 256
    layers: int = 4
    width: int = 512
    heads: tuple[int, int] = (16, 2)
    dim: int = 64


def rotated(x: Tensor) -> Tensor:
    """Rotary positions in x: [B, T, ..., D], computed in float32."""
    half = x.shape[-1] // 2
    rates = BASE ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates  # [T, D / 2]
    angles = angles.view(x.shape[1], *[1] * (x.ndim - 3), half)
    a, b = x.float().split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Attention that reads what its spec says: a projection for each tensor that has a row a token, and a
    parameter for each other one.  Without a spec it is dense.

    What belongs to an index learns from the spec's loss alone, as its authors have it: it reads the
    layer's input as a constant.
    """

    def __init__(
        self,
        size: Size,
        spec: Spec | None,
        *,
        plain: bool,
        plain_losses: bool,
        interpret: bool,
    ) -> None:
        super().__init__()
        query, kv = size.heads
        self.spec, self.plain, self.plain_losses = spec, plain, plain_losses
        self.attend = hsgen.load_kernel(spec, interpret=interpret) if spec and not plain else None
        shapes = {"q": (1, 1, query, size.dim), "k": (1, 1, kv, size.dim)}
        shapes |= {"v": shapes["k"]} if spec is None else tensor_shapes(spec, 1, 1, 1)
        kinds = {} if spec is None else tensor_kinds(spec)
        self.rows: dict[str, tuple[int, ...]] = {}
        self.project, self.learned = nn.ModuleDict(), nn.ParameterDict()
        for name, shape in shapes.items():
            match kinds.get(name, "key"):
                case "query" | "key":
                    self.rows[name] = shape[2:]
                    self.project[name] = nn.Linear(size.width, math.prod(shape[2:]), bias=False)
                case "parameter":
                    self.learned[name] = nn.Parameter(torch.empty(shape))
                case kind:
                    raise ValueError(
                        f"{name}: expected a tensor of rows or a parameter, got {kind}"
                    )
        self.out = nn.Linear(query * size.dim, size.width, bias=False)

    def tensors(self, x: Tensor) -> dict[str, Tensor]:
        """What the attention reads.  x: [B, T, width]"""
        found: dict[str, Tensor] = {}
        for name, rows in self.rows.items():
            indexed = name.endswith("_index")
            y = self.project[name](x.detach() if indexed else x).unflatten(-1, rows)
            if name == "gates":
                y = y.sigmoid()
            elif name == "w_index":
                y = y * (rows[0] * self.rows["k_index"][0]) ** -0.5
            elif name[0] in "qk":
                y = rotated(y)
            found[name] = y
        return found | dict(self.learned)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, width] -> the same, and the weighted losses of the spec, f32[]"""
        tensors = self.tensors(x)
        if self.spec is None:
            q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            o, losses = o.transpose(1, 2), {}
        elif self.attend is None:
            o, losses = self._plain(tensors)
        else:
            o = self.attend(**tensors)
            losses = self._losses(tensors) if self.spec.loss and self.training else {}
        weighed = [WEIGHTS[name] * loss for name, loss in losses.items()]
        return self.out(o.flatten(-2)), sum(weighed, x.new_zeros((), dtype=torch.float32))

    def _plain(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The reference, which has all gradients and losses on any device."""
        assert self.spec is not None, "dense attention has no reference"
        with torch.autocast(tensors["q"].device.type, enabled=False):
            wide = {name: x.float() for name, x in tensors.items()}
            found = reference(self.spec, wide, dtype=torch.float32, keep_scores=False)
        return found.o, found.loss

    def _losses(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Beside attention on kernels; those of the reference are computed again in the backward."""
        assert self.attend is not None, "the reference has losses beside outputs"
        if not self.plain_losses:
            return self.attend.losses(**tensors)
        with torch.autocast(tensors["q"].device.type, enabled=False):
            wide = {name: x.float() for name, x in tensors.items()}
            make = partial(self.attend.reference_losses, dtype=torch.float32, **wide)
            return checkpoint(make, use_reentrant=False)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and beside what passes."""

    def __init__(self, size: Size, spec: Spec | None, **how: bool) -> None:
        super().__init__()
        wide = -(-size.width * 8 // 3 // 64) * 64
        self.norms = nn.ModuleList(nn.RMSNorm(size.width) for _ in range(2))
        self.attention = Attention(size, spec, **how)
        self.up = nn.Linear(size.width, 2 * wide, bias=False)
        self.down = nn.Linear(wide, size.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, width] -> the same, and the spec's losses, f32[]"""
        attended, loss = self.attention(self.norms[0](x))
        x = x + attended
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), loss


class LanguageModel(nn.Module):
    """Tokens to logits.

    Args:
        size: Of the model; a spec must say the same of heads.
        spec: What every layer attends by; None is dense.
        plain: Attention is the reference, and activations are computed again in the backward.
        plain_losses: The spec's losses are the reference's, beside attention on kernels.
        interpret: CPU tensors run the kernels, in Triton's interpreter.
        seed: Weights of one name are the same whatever the spec.
    """

    def __init__(
        self,
        size: Size,
        spec: Spec | None = None,
        *,
        plain: bool = False,
        plain_losses: bool = False,
        interpret: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plain = plain
        self.embed = nn.Embedding(size.vocabulary, size.width)
        how = {"plain": plain, "plain_losses": plain_losses, "interpret": interpret}
        make = partial(Block, size, spec, **how)
        self.blocks = nn.ModuleList(make() for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        for name, weight in self.named_parameters():
            if weight.ndim > 1 or "learned" in name:  # norms begin as ones
                initialise(name, weight, size.layers, seed)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: i64[B, T] -> logits [B, T, vocabulary], and the mean of layers' own losses, f32[]"""
        x, losses = self.embed(tokens), []
        for block in self.blocks:
            again = self.plain and torch.is_grad_enabled()
            x, loss = checkpoint(block, x, use_reentrant=False) if again else block(x)
            losses.append(loss)
        return F.linear(self.norm(x), self.embed.weight), torch.stack(losses).mean()


@torch.no_grad()
def initialise(name: str, weight: Tensor, layers: int, seed: int) -> None:
    """Weights by their name: drawn alike in every model, pools as means, centroids of length 1."""
    drawn = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    noise = torch.randn(weight.shape, generator=drawn)
    match name.split(".")[-2:]:
        case ["learned", own] if own.endswith("_weight"):  # [Hkv, tokens, D, D]
            weight.copy_(torch.eye(weight.shape[-1]) / weight.shape[1])
        case ["learned", own] if own.endswith("_position"):
            weight.zero_()
        case ["learned", own] if own.endswith("_centroids"):
            weight.copy_(F.normalize(noise, dim=-1))
        case ["learned", own]:
            raise ValueError(f"{own}: nothing says what this parameter begins as")
        case [("out" | "down"), _]:
            weight.copy_(noise * 0.02 * (2 * layers) ** -0.5)
        case _:
            weight.copy_(noise * 0.02)


def main() -> None:
    """A few steps of a model with NSA, whose blocks and heads are small, on Python's language reference."""
    size = Size(layers=2, width=64, heads=(4, 2), dim=16)
    small = {"heads": Heads(query=4, kv=2), "head_dim": HeadDim(qk=16, v=16)}
    spec = load("nsa").model_copy(update=small)
    model = LanguageModel(size, spec, plain=True)
    text = torch.tensor(list(manual().encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(0)
    for step in range(10):
        starts = torch.randint(len(text) - 129, (4,), generator=drawn)
        tokens = torch.stack([text[i : i + 129] for i in starts])
        logits, loss = model(tokens[:, :-1])
        surprise = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (surprise + loss).backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: {surprise.item() / math.log(2):.2f} bits a byte")


if __name__ == "__main__":
    main()
