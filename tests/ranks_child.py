"""Two ranks of one host, over gloo: what `test_ranks.py` starts, as a process that forks.

Each check compares what the ranks have together with the same computed by one rank alone.
"""

import os
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hsgen import load_kernel, standins
from hsgen.errors import ArgumentError, PlanError
from hsgen.reference import tensor_kinds, tensor_shapes
from hsgen.spec import load, parse

POOLED = parse("""
hsgen: 1
name: pooled
heads: {query: 4, kv: 2}
head_dim: 8
levels:
  - name: entry
    partition: {blocks: 4}
    pool: {keys: linear, values: mean}
    score: {form: dot, normalise: softmax, share: group, reduce: sum}
  - name: block
    partition: {blocks: 4}
    score: {from: entry, map: overlap_sum}
    select: {top_k: 2, force: {last: 1}}
attend:
  - {name: entry, over: entry, values: pooled}
  - {name: selected, over: block}
combine: {gates: input}
""")
RANKS = 2
T = 13


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def tensors(spec, B):
    torch.manual_seed(0)  # alike on every rank
    return {n: torch.randn(s) for n, s in tensor_shapes(spec, B, T, T).items()}


def split(name, kind, axis):
    """How a tensor of `POOLED` lies where the batch, or the heads, are split."""
    if axis == "batch":
        return Replicate() if kind == "parameter" else Shard(0)
    return Shard(0) if kind == "parameter" else Shard(2)


def check_dtensors(mesh, compiles):
    kernel, kinds = load_kernel(POOLED), tensor_kinds(POOLED)
    x = tensors(POOLED, 3)  # of which one rank has two, and one has one
    alone = {n: y.clone().requires_grad_() for n, y in x.items()}
    o, lse = kernel(**alone, return_lse=True)
    (o.square().sum() + lse["selected"].sum()).backward()
    for axis in ("batch", "heads"):
        y = {}
        for name, each in x.items():
            made = distribute_tensor(each, mesh, [split(name, kinds[name], axis)])
            y[name] = made.detach().requires_grad_()
        found, of_lse = kernel(**y, return_lse=True)
        assert isinstance(found, DTensor)
        assert found.placements == (Shard(0 if axis == "batch" else 2),)
        assert (found.shape, found.stride()) == (o.shape, o.stride())
        close(found.full_tensor(), o)
        close(of_lse["selected"].full_tensor(), lse["selected"])
        chosen = kernel.select(**y)
        assert torch.equal(
            chosen["block"].indices.full_tensor(), kernel.select(**x)["block"].indices
        )
        close(kernel(**y, selection=chosen).full_tensor(), o)
        (found.square().sum() + of_lse["selected"].sum()).backward()
        for name, each in y.items():
            assert each.grad.placements == each.placements, name
            close(each.grad.full_tensor(), alone[name].grad)
    swapped = {
        n: each.transpose(1, 2) if kinds[n] != "parameter" else each for n, each in y.items()
    }
    close(kernel(**swapped, layout="bhtd").full_tensor().transpose(1, 2), o)
    if compiles:
        kernel._parts.clear()
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        close(compiled(**y).full_tensor(), o)


def check_part(rank, spec):
    """Plain tensors of a rank's own heads."""
    x = tensors(spec, 1)
    at = {n: 0 if kind == "parameter" else 2 for n, kind in tensor_kinds(spec).items()}
    mine = {n: y.chunk(RANKS, at[n])[rank] for n, y in x.items()}
    kernel = load_kernel(spec)
    close(kernel.part(RANKS)(**mine), kernel(**x).chunk(RANKS, 2)[rank])


def refused(error, words, call):
    try:
        call()
    except error as said:
        assert words in str(said), said
    else:
        raise AssertionError(words)


def check_refusals(mesh):
    x = {name: distribute_tensor(y, mesh, [Replicate()]) for name, y in tensors(POOLED, 2).items()}
    kernel = load_kernel(POOLED)
    assert kernel(**x).placements == (Replicate(),)
    rows = x["q"].redistribute(placements=[Shard(1)])
    words = "q: expected it whole, or split by batch or heads"
    refused(ArgumentError, words, lambda: kernel(**{**x, "q": rows}))
    words = "k: expected a DTensor"
    refused(ArgumentError, words, lambda: kernel(**{**x, "k": x["k"].to_local()}))
    batch, heads = (x[n].redistribute(placements=[Shard(d)]) for n, d in (("q", 0), ("k", 2)))
    words = "k: expected the batch to be split, as of q, got its heads"
    refused(ArgumentError, words, lambda: kernel(**{**x, "q": batch, "k": heads}))
    words = "parts that divide 4 key heads, got 8"
    refused(ArgumentError, words, lambda: load_kernel("nsa").part(8))
    load_kernel("hisa").part(RANKS)  # every rank chooses for all heads, alike
    words = "may differ by the number of a head"
    refused(PlanError, words, lambda: load_kernel("moa").part(RANKS))


class Model(nn.Module):
    """Two layers that share one kernel; its pooling weights are parameters of the model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = load_kernel(POOLED)
        self.qkv, self.gates = nn.Linear(16, 64), nn.Linear(16, 8)
        self.weight = nn.Parameter(
            torch.randn(tensor_shapes(POOLED, 1, 1, 1)["entry_key_weight"]) / 8
        )
        self.out = nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (8, 8)).split((4, 2, 2), -2)
        gates = self.gates(x).unflatten(-1, (4, 2)).sigmoid()
        o = self.attention(q, k, v, gates=gates, entry_key_weight=self.weight)
        return self.out(o.flatten(-2)).clone()  # FSDP wants no view


def check_data_parallel(rank, mesh):
    """A step of SGD, each rank with its part of the batch, is that of the whole batch."""
    torch.manual_seed(2)
    x = torch.randn(RANKS * 2, T, 16)

    def step(model, x, of=None):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        model(x).square().mean().backward()
        optimiser.step()
        return (of or model).state_dict()

    expected = step(Model(), x)
    mine = x.chunk(RANKS)[rank]
    ddp = DistributedDataParallel(Model())
    fsdp = Model()
    for layer in fsdp.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(fsdp, mesh=mesh)
    for found in (step(ddp, mine, ddp.module), step(fsdp, mine)):
        assert list(found) == list(expected)
        for name, each in found.items():
            close(each.full_tensor() if isinstance(each, DTensor) else each, expected[name])


def check_page():
    """The part of docs/training.md for many ranks, after the model that it begins with."""
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    found = {}
    for text in (snippets[0], *(text for text in snippets if "init_device_mesh" in text)):
        exec(compile(text, "training.md", "exec"), found)
    assert torch.equal(found["o"].to_local(), found["mine"])


def rank_main(rank, place, compiles):
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)})
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    check_dtensors(mesh, compiles)
    check_part(rank, POOLED)
    for name in ("xattention", "psa_mass"):  # heads choose as many as hold a mass, each for itself
        check_part(rank, standins.bind(load(name), query=4, kv=2, dim=16))
    check_refusals(mesh)
    check_data_parallel(rank, mesh)
    check_page()
    dist.destroy_process_group()


def main():
    """Fork the ranks, so that they import once."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                rank_main(rank, sys.argv[1], "compiles" in sys.argv)
            except BaseException:  # noqa: BLE001 -- the fork of a test never returns into its parent's code
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
