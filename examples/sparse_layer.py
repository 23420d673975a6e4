"""An attention layer over a spec, run on CPU tensors: python examples/sparse_layer.py"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import hsgen
from hsgen.spec import HeadDim, Heads, Spec, load

SPEC = Path(__file__).with_name("block_topk.yaml")


class SparseAttention(nn.Module):
    """Self-attention whose pattern a spec describes; the spec also says how many heads there are.

    Kernels own no parameters: the projections are this layer's.  Position embeddings, which belong
    between the projections and the attention, are left out.
    """

    def __init__(self, hidden: int, spec: Spec) -> None:
        super().__init__()
        self.attend = hsgen.load_kernel(spec)
        heads, dim = self.attend.spec.heads, self.attend.spec.head_dim
        assert heads is not None, "this layer takes heads from the spec"
        assert dim is not None, "this layer takes head_dim from the spec"
        self.project_q = nn.Linear(hidden, heads.query * dim.qk, bias=False)
        self.project_k = nn.Linear(hidden, heads.kv * dim.qk, bias=False)
        self.project_v = nn.Linear(hidden, heads.kv * dim.v, bias=False)
        self.project_o = nn.Linear(heads.query * dim.v, hidden, bias=False)
        self.sizes = ((heads.query, dim.qk), (heads.kv, dim.qk), (heads.kv, dim.v))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, hidden] -> [B, T, hidden]"""
        projections = (self.project_q, self.project_k, self.project_v)
        q, k, v = (
            project(x).unflatten(-1, size)  # [B, T, heads, dim]
            for project, size in zip(projections, self.sizes, strict=True)
        )
        return self.project_o(self.attend(q, k, v).flatten(-2))


def main() -> None:
    """Attend, differentiate, and look at what was selected."""
    torch.manual_seed(0)
    # a Spec is a frozen value: the same attention with small heads, for a laptop
    small = {"heads": Heads(query=8, kv=2), "head_dim": HeadDim(qk=32, v=32)}
    spec = load(SPEC).model_copy(update=small)
    layer = SparseAttention(hidden=256, spec=spec)
    x = torch.randn(1, 1200, 256)
    y = layer(x)
    y.square().mean().backward()
    print(f"output {list(y.shape)}, gradient of project_q {layer.project_q.weight.grad.norm():.2e}")

    q = layer.project_q(x).unflatten(-1, layer.sizes[0])
    k = layer.project_k(x).unflatten(-1, layer.sizes[1])
    chosen = layer.attend.select(q, k)["block"].indices  # [B, T, Hkv, 16], -1 padded
    print(f"blocks of the last token, key head 0: {chosen[0, -1, 0].tolist()}")


if __name__ == "__main__":
    main()
