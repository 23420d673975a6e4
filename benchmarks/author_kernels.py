"""Triton kernels of systems' authors as calls on hsgen's tensors: their layouts, their forms of a choice.

What may be prepared is prepared before a call, to their advantage.  Times nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import peers, video
from benchmarks.peers import Missing
from hsgen.spec import Blocks, Spec, verify

Tensors = Mapping[str, Tensor]
Load = Callable[[str], ModuleType]  # a module of theirs by name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """What an author's code does with one set of inputs; None: it has no such call.

    Attributes:
        choose: -> its form of a choice.
        listed: its form of a choice -> bool[H, M, N], entries of each block of rows.
        given: and from there.
        attend: its form of a choice -> o[1, T, H, D].
        whole: -> o[1, T, H, D], on what `choose` chooses.
    """

    choose: Callable[[], Tensor] | None = None
    listed: Callable[[Tensor], Tensor] = lambda chosen: chosen[0]
    given: Callable[[Tensor], Tensor] = lambda mask: mask[None]
    attend: Callable[[Tensor], Tensor] | None = None
    whole: Callable[[], Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """The kernels of one system.

    Attributes:
        title: for the tables.
        system: the spec.
        repository: as GitHub names it, or
        package: as PyPI does; the files are in DIR/<last part>.
        root: the folder in there that modules are in.
        bare: packages that are entered without their `__init__`.
        missing: what they import and is stood in for.
        level: whose choice theirs is comparable with; None: they choose nothing, or something else.
        steps: it is steps of decoding that are compared.
        loose: its output is another's than ours, and is held beside dense attention alone.
        spec: at so many tokens.
        make: (modules, spec, tensors) -> its calls.
        notes: where theirs means something else, and what of it is changed here.
    """

    title: str
    system: str
    repository: str = ""
    package: str = ""
    root: str = "."
    bare: tuple[str, ...] = ()
    missing: Mapping[str, Missing]
    level: str | None = None
    steps: bool = False
    loose: bool = False
    spec: Callable[[Spec, int], Spec] = lambda spec, _tokens: spec
    inputs: Callable[[dict[str, Tensor]], None] = lambda _tensors: None
    make: Callable[[Load, Spec, Tensors], Calls]
    notes: str

    def folder(self, sources: Path) -> Path:
        """Where its files are.

        Raises:
            FileNotFoundError: what to fetch, and whereto.
        """
        name = self.package or self.repository.split("/")[1]
        if (found := sources.resolve() / name).is_dir():
            return found
        fetch = f"git clone https://github.com/{self.repository} {sources / name}"
        if self.package:
            fetch = f"pip download --no-deps {self.package}, unpacked into {sources / name}"
        raise FileNotFoundError(f"{self.title}: expected its files in {sources / name}; {fetch}")

    def load(self, sources: Path, name: str) -> ModuleType:
        """One of its modules, as Python imports it."""
        checkout = self.folder(sources) / self.root
        return peers.imported(checkout, name, self.bare, self.missing)


def heads_first(x: Tensors, names: Sequence[str] = ("q", "k", "v")) -> list[Tensor]:
    """Tensors with a copy of keys and values for every query head.  -> [1, Hq, T, D]"""
    heads = x["q"].shape[2]
    wide = [x[name].repeat_interleave(heads // x[name].shape[2], 2) for name in names]
    return [y.transpose(1, 2).contiguous() for y in wide]


def tokens_first(o: Tensor) -> Tensor:
    """[1, H, T, D] -> [1, T, H, D]"""
    return o.transpose(1, 2)


def size_of(spec: Spec, level: str) -> int:
    """Tokens of an entry."""
    partition = spec.level(level).partition
    assert isinstance(partition, Blocks)
    return partition.size


# --- XAttention


def xattention(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Their estimate of masses, in Triton, and their choice, in PyTorch; they attend in CUDA."""
    module = load("xattn.src.Xattention")
    q, k, _ = heads_first(x)
    T, select = q.shape[2], spec.level("block").select
    assert select is not None
    assert select.top_p is not None
    size, mass = size_of(spec, "block"), select.top_p.mass
    long = 1 << (T - 1).bit_length()
    chunk = max(min(max(2048, long), 128 * 1024 * 2048 // long), 2048)  # as their prefill has it

    def choose() -> Tensor:
        with _named("H100"):
            return module.xattn_estimate(
                q,
                k,
                block_size=size,
                stride=size_of(spec, "tile"),
                threshold=mass,
                chunk_size=min(chunk, T),
                use_triton=True,
                causal=True,
            )[1]

    return Calls(choose=choose)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """A card of another name, in all else what it is."""
    properties = torch.cuda.get_device_properties

    class Renamed:
        """What is asked for is the card's."""

        def __init__(self, device: int | None = None) -> None:
            self._of, self.name = properties(device), name

        def __getattr__(self, asked: str) -> object:
            return getattr(self._of, asked)

    with patch("torch.cuda.get_device_properties", Renamed):
        yield


# --- SeerAttention


def seer_attention(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Their gate, in PyTorch, and their attention to a map of blocks, in Triton.

    The gate's map of queries is in q_gate already; keys have a map for each key head, as ours.
    """
    gates, common = load("seer_attn.prefill_sparse.attn_gate"), load("seer_attn.modules.common")
    attention = load("seer_attn.kernels.block_sparse_attn").block_sparse_triton_fn
    q, k, v = heads_first(x)
    size, dim = size_of(spec, "block"), q.shape[-1]
    select = spec.level("block").select
    assert select is not None
    N = -(-q.shape[2] // size)
    gate = gates.ATTNGATE_CLASSES["Qavg_Kmaxminavg"](
        size, dim, dim, x["k_gate"].shape[2], q.shape[1], force_double=True
    )
    gate.mask_linear_q = None
    weight = x["block_key_weight"].flatten(1, 2)
    gate.mask_linear_k.weight = torch.nn.Parameter(weight, requires_grad=False)
    at = torch.arange(0, x["q"].shape[1], size)
    cos, sin = (torch.cat([x[f"{n}_block"][:, at]] * 2, -1).to(q.dtype) for n in ("cos", "sin"))
    earlier = torch.ones(N, N, dtype=torch.bool, device=q.device).tril()
    own = torch.eye(N, dtype=torch.bool, device=q.device)

    def choose() -> Tensor:
        masses = gate(x["q_gate"], x["k_gate"], earlier, (cos, sin))
        return common.get_sparse_attn_mask_from_threshold(masses, select.threshold) | own

    def attend(mask: Tensor) -> Tensor:
        return tokens_first(attention(q, k, v, mask, dim**-0.5, size, size))

    return Calls(
        choose=choose,
        given=lambda mask: mask[None].contiguous(),
        attend=attend,
        whole=lambda: attend(choose()),
    )


def seer_attention_r(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Their step: attention to a list of blocks behind a cache, in Triton.  q: [B, 1, Hq, D], k and v with
    all the room of a cache, lengths: i32[B].
    """
    module = load("seer_attn.kernels.varlen.triton_sparse_gqa_decode_varlen_indice")
    q, k, v, lengths = x["q"][:, 0].contiguous(), x["k"], x["v"], x["lengths"]
    size = size_of(spec, "block")

    def attend(lists: Tensor) -> Tensor:
        return module.block_sparse_flash_decode_gqa_indice_triton(
            q, k, v, lengths, k.shape[1], lists.shape[-1], lists, size
        )[:, None]

    return Calls(attend=attend)


FLASH: dict[str, Missing] = {
    "flash_attn.bert_padding": (
        "index_first_axis",
        "index_put_first_axis",
        "pad_input",
        "unpad_input",
    ),
    "flash_attn.layers.rotary": ("apply_rotary_emb_func",),
    "einops": ("rearrange", "einsum"),
}


# --- VSA

FASTVIDEO = "fastvideo_kernel"


def vsa(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Their Triton path, of tiles that lie one after the other.  Queries, keys and values come so."""
    ops = load(f"{FASTVIDEO}.ops")
    kernels, index = (
        load(f"{FASTVIDEO}.triton_kernels.{name}") for name in ("block_sparse_attn_triton", "index")
    )
    axes = tuple(int(length) for length in spec.axes or ())
    assert len(axes) == 3
    of = video.tiles(axes, x["q"].device.type)
    order = of.argsort(stable=True)
    back = order.argsort()
    q, k, v, gate = (
        y[:, order].transpose(1, 2).contiguous()
        for y in (x["q"], x["k"], x["v"], x["gates"][:, :, :, 0])
    )
    sizes = torch.bincount(of).to(torch.int32)
    level = spec.level("tile").select
    assert level is not None
    assert level.fraction is not None
    kept, size = math.ceil(level.fraction * len(sizes)), 64

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor]:
        lists = index.map_to_index(mask)
        return (kernels.triton_block_sparse_attn_forward(q, k, v, *lists, sizes)[0],)

    ops.block_sparse_attn = attention  # without what asks for a CUDA device, and without gradients

    def choose() -> Tensor:
        means = (ops.fused_block_mean(y, sizes, size) for y in (q, k))
        scores = torch.matmul(next(means), next(means).transpose(-2, -1)) / q.shape[-1] ** 0.5
        return ops.fused_topk_mask(scores, kept)

    def whole() -> Tensor:
        o = ops.video_sparse_attn(q, k, v, sizes, sizes, kept, 4, compress_attn_weight=gate)
        return tokens_first(o)[:, back]

    return Calls(choose=choose, whole=whole)


def with_axes(spec: Spec, tokens: int) -> Spec:
    """A video of so many tokens, a power of two: axes of whole tiles."""
    power = tokens.bit_length() - 1
    axes = (1 << power // 3, 1 << (power + 1) // 3, 1 << (power + 2) // 3)
    return verify(spec.model_copy(update={"axes": axes}))


def fine_gate_open(x: dict[str, Tensor]) -> None:
    """Theirs has none for the fine branch."""
    x["gates"].sigmoid_()
    x["gates"][:, :, :, 1] = 1


# --- MInference


def minference_blocks(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Heads that choose blocks by pooled queries and keys."""
    module = load("minference.ops.block_sparse_flash_attention")
    q, k, v = heads_first(x)
    T, size, dim = q.shape[2], size_of(spec, "block"), q.shape[-1]
    select = spec.level("block").select
    assert select is not None
    lengths = torch.tensor([T], dtype=torch.int32, device=q.device)
    N = -(-T // size)
    earlier = torch.ones(N, N, dtype=torch.bool, device=q.device).tril()
    kept = min(select.budget, N)

    def choose() -> Tensor:
        return module._build_block_index(q, k, select.budget, size, size)

    def listed(chosen: Tensor) -> Tensor:
        mask = torch.zeros(*chosen.shape[1:3], N, dtype=torch.bool, device=chosen.device)
        return mask.scatter_(-1, chosen[0].long(), True) & earlier

    def given(mask: Tensor) -> Tensor:
        """Their lists are full: what a row cannot see fills them up, and is masked by its place."""
        order = torch.arange(N, device=mask.device).expand_as(mask)
        later = torch.where(mask, order, order + N)
        return (later.sort(-1).values[..., :kept] % N).sort(-1).values[None].to(torch.int32)

    def attend(chosen: Tensor) -> Tensor:
        scale = dim**-0.5
        return tokens_first(
            module._triton_block_sparse_attention(q, k, v, lengths, chosen, scale, size, size)
        )

    return Calls(
        choose=choose, listed=listed, given=given, attend=attend, whole=lambda: attend(choose())
    )


def minference_a_shape(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Heads that see a sink and a window."""
    module = load("minference.ops.streaming_kernel")
    q, k, v = heads_first(x)
    static = next(branch.static for branch in spec.attend if branch.static)
    sizes = {"n_init": static.sink, "n_local": static.window}
    config = {"attn_forward_config": sizes}
    return Calls(whole=lambda: tokens_first(module.a_shape_kernel(q, k, v, config)))


def routed(way: int) -> Callable[[dict[str, Tensor]], None]:
    """All heads go one way."""

    def set_route(x: dict[str, Tensor]) -> None:
        x["route"] = torch.full_like(x["route"], way, dtype=torch.int32)

    return set_route


# --- MoA


def moa(load: Load, spec: Spec, x: Tensors) -> Calls:
    """A sink and a window for each head, of 64 tokens; float16 is what it has."""
    kernel = load("MoA.kernels.block_sparse_attention_prefill")._sparse_attention_moa_prefill
    q, k, v = (y.half() for y in heads_first(x))
    static = next(branch.static for branch in spec.attend if branch.static)
    size, T, heads = static.blocks, q.shape[2], q.shape[1]
    N, spans = -(-T // size), static.per_head
    windows = [each.window + math.floor(each.grow * max(0, N - each.window)) for each in spans]
    sinks = [each.sink for each in spans]
    per = [[kinds[h % len(kinds)] for h in range(heads)] for kinds in (sinks, windows)]
    sink, window = (torch.tensor(n, dtype=torch.int32, device=q.device) for n in per)
    scale = q.shape[-1] ** -0.5
    return Calls(whole=lambda: tokens_first(kernel.apply(q, k, v, scale, sink, window, size, size)))


# --- Superlinear


def superlinear(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Search, spans and window."""
    module = load("superlinear.kernels.superlinear.attention._prefill")
    search, q, k, v = (x[n].transpose(1, 2).contiguous() for n in ("q_search", "q", "k", "v"))
    at = torch.arange(q.shape[2], device=q.device)
    select = spec.level("anchor").select
    assert select is not None
    settings = {"sw_index": 3, "topk": select.budget, "backward_factor": 2.0, "span_power": 0.5}

    def whole() -> Tensor:
        call = module.fused_prefill_with_swtriton_gqa
        return tokens_first(call(search, q, k, v, at, None, **settings))

    return Calls(whole=whole)


# --- HiP


def hip(load: Load, spec: Spec, x: Tensors) -> Calls:
    """Their three stages and their attention to what these leave, of version 1.2.4."""
    os.environ.setdefault("HIP_DEBUG_BENCH", "0")
    module = load("hip_attn.v1_2.attention_extend")
    metadata = load("hip_attn.v1_2.attention_metadata")
    q, k, v = (x[n].contiguous() for n in ("q", "k", "v"))
    q = q * q.shape[-1] ** -0.5  # as their callers hand it in
    window = next(branch.window for branch in spec.attend if branch.window)
    last = spec.level("block").select
    assert last is not None
    at = torch.arange(q.shape[1], device=q.device)[None]

    settings = {
        "position_ids": at,
        "sink_token_size": 256,
        "sliding_window_size": window,
        "second_stage_k": last.budget * 8,
        "require_cache_statistics": False,
        "require_stage_caches": False,
    }

    def run(*, choose: bool) -> tuple[Tensor, SimpleNamespace]:
        args = metadata.HiPAttentionArgs(**settings, mask_only=choose)
        return module.dual_stage_quadratic_hip_attention(q, k, v, args)

    found = run(choose=False)[1]
    indices, counts = found.indices, found.ks  # [H, M, K] and [H, M]

    def choose() -> Tensor:
        run(choose=True)  # which hands nothing out
        return indices

    def listed(chosen: Tensor) -> Tensor:
        N = -(-k.shape[1] // 8)
        slot = torch.arange(chosen.shape[-1], device=chosen.device)
        entries = torch.where(slot < counts[..., None], chosen // 8, N).clamp(max=N).long()
        mask = torch.zeros(*chosen.shape[:2], N + 1, dtype=torch.bool, device=chosen.device)
        return mask.scatter_(-1, entries, True)[..., :N]

    return Calls(choose=choose, listed=listed, whole=lambda: run(choose=False)[0])


# --- all of them

AUTHORS = {
    "xattention": Author(
        title="XAttention",
        system="xattention",
        repository="mit-han-lab/x-attention",
        bare=("xattn", "xattn.src"),
        missing={"block_sparse_attn": ("block_sparse_attn_func",)},
        level="block",
        make=xattention,
        notes="It attends with a kernel in CUDA, which is not here; its choice alone is timed.  Logits of "
        "all tiles go through memory, in bf16, as masses of blocks.  One block more than the mass needs is "
        "taken, and in the first chunk of rows the first block is not forced.  Its kernels are left for "
        "PyTorch where the card's name has no 100 in it, as on an H200: here it is told another name.",
    ),
    "seer_attention": Author(
        title="SeerAttention",
        system="seer_attention",
        repository="microsoft/SeerAttention",
        bare=("seer_attn", *(f"seer_attn.{n}" for n in ("modules", "prefill_sparse", "kernels"))),
        missing=FLASH,
        level="block",
        make=seer_attention,
        notes="Its gate is PyTorch, in bf16.  The own block, which ours forces, is added to its choice.",
    ),
    "seer_attention_r": Author(
        title="SeerAttention-R, a step",
        system="seer_attention_r",
        repository="microsoft/SeerAttention",
        bare=("seer_attn", "seer_attn.kernels", "seer_attn.kernels.varlen"),
        missing=FLASH,
        level="block",
        steps=True,
        make=seer_attention_r,
        notes="Of a step its attention alone, on our choice, in a CUDA graph; its gate is PyTorch.",
    ),
    "vsa": Author(
        title="FastVideo",
        system="vsa",
        repository="hao-ai-lab/FastVideo",
        root="fastvideo-kernel/python",
        bare=(FASTVIDEO, f"{FASTVIDEO}.triton_kernels"),
        missing={},
        level="tile",
        spec=with_axes,
        inputs=fine_gate_open,
        make=vsa,
        notes="Its Triton path, which is that of every card without its compiled extension.  Tokens come to "
        "it tile by tile; ours has them in the video's order.  Means and scores are kept in bf16.",
    ),
    "minference_blocks": Author(
        title="MInference, blocks",
        system="minference",
        repository="microsoft/MInference",
        bare=("minference", "minference.ops"),
        missing={},
        level="block",
        inputs=routed(1),
        make=minference_blocks,
        notes="All heads go this way.  Means and scores are kept in bf16.",
    ),
    "minference_a_shape": Author(
        title="MInference, A shape",
        system="minference",
        repository="microsoft/MInference",
        bare=("minference", "minference.ops"),
        missing={},
        inputs=routed(2),
        make=minference_a_shape,
        notes="All heads go this way.",
    ),
    "moa": Author(
        title="MoA",
        system="moa",
        repository="thu-nics/MoA",
        bare=("MoA", "MoA.kernels"),
        missing={},
        make=moa,
        notes="It has float16 alone: its inputs are ours, rounded.",
    ),
    "superlinear": Author(
        title="Superlinear",
        system="superlinear",
        package="superlinear",
        missing={},
        make=superlinear,
        notes="",
    ),
    "hip": Author(
        title="HiP",
        system="hip",
        package="hip-attn",
        bare=("hip_attn", "hip_attn.v1_2", "hip_attn.utils"),
        missing={
            "cv2": (),
            "numba": ("njit", "prange"),
            "numba.cuda": (),
            "matplotlib": ("pyplot",),
            "matplotlib.pyplot": (),
            "numpy": ("ndarray",),
            "tqdm": (),
            "cuda": (),
            "cuda.cudart": (),
            "hip_attn.v1_1.offload_runner.tensor_from_pointer": ("alloc_managed_tensor", "sizeof"),
        },
        level="block",
        loose=True,
        make=hip,
        notes="Version 1.2.4, which needs least beside Triton.  Every fourth row asks in its first two "
        "stages.  It searches neither the sink nor a row's last 768 tokens, so that all that it keeps lies "
        "beyond what is seen anyhow; ours searches all that a row sees: of the 288 blocks that a row of "
        "8,192 tokens keeps 32 are the sink, and about 100 in the window.  The shares say little more than "
        "that, and theirs comes nearer to dense attention.",
    ),
}
