"""One call: a spec, its tensors, and where its sequences lie.  And what comes out of it."""

from dataclasses import dataclass, field, replace

import torch

from hsgen.reference import reference, tensor_kinds, tensor_shapes
from hsgen.reference.grids import tile_of

HUGE = {torch.float16: 3e4, torch.bfloat16: 1e30, torch.float32: 1e30}
WHOLE = 840  # divided by each number of rows up to 8, so that their mean is whole
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """What a backend is asked.

    Attributes:
        spec: heads and head dims bound.
        tensors: by name, [B, T, H, D] or packed [total, H, D], with any strides.
        options: cu_seqlens_q, cu_seqlens_k, q_offset, kv_lens, selection: as the reference has them.
    """

    spec: object
    tensors: dict
    options: dict = field(default_factory=dict)

    @property
    def dtype(self):
        return self.tensors["q"].dtype

    @property
    def device(self):
        return self.tensors["q"].device

    @property
    def packed(self):
        return self.tensors["q"].ndim == 3

    @property
    def tokens(self):
        """T, or the total of all queries when packed."""
        return self.tensors["q"].shape[-3]

    @property
    def keys(self):
        """S, or the total of all keys when packed."""
        kinds = tensor_kinds(self.spec)
        names = [name for name, kind in kinds.items() if kind == "key" and name != "k_index"]
        return self.tensors[names[0]].shape[0 if self.packed else 1]

    def with_tensors(self, **tensors):
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options):
        return replace(self, options=self.options | options)

    def reference(self, dtype=torch.float64, **options):
        """What the reference says, in float64 on the tensors as they are rounded."""
        return reference(self.spec, self.tensors, **(self.options | options), dtype=dtype)

    def rows(self, start, stop):
        """The same call for query rows [start, stop) only; positions stay."""
        kinds = tensor_kinds(self.spec)
        tensors = {
            name: t[:, start:stop] if kinds[name] == "query" else t
            for name, t in self.tensors.items()
        }
        offset = self.options.get("q_offset", self.keys - self.tokens)
        return replace(self, tensors=tensors).with_options(q_offset=offset + start)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a backend returns: o like q, lse {branch: f32[B, Hq, T]}, selection {level: i32 indices}."""

    o: torch.Tensor
    lse: dict
    selection: dict

    def tensors(self):
        """Everything, by name."""
        lse = {f"lse[{name}]": t for name, t in self.lse.items()}
        return {"o": self.o} | lse | {f"selection[{name}]": t for name, t in self.selection.items()}


def make(spec, *, B=1, T=61, S=None, dtype=torch.float32, seed=0, device="cpu", integers=False):
    """A call with random tensors, the last query on the last key."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, B, T, T if S is None else S)
    draw = _integers if integers else _normal
    whole = {name for name in shapes if name.endswith("_split")}  # where entries part
    tensors = {
        name: draw(spec, name, shape, generator).to(torch.int32 if name in whole else dtype)
        for name, shape in shapes.items()
        if name != "route"
    }
    tensors = {name: x.to(device) for name, x in tensors.items()}
    if "route" in shapes:  # one of its ways for each sequence
        ways = torch.randint(0, len(spec.route.input), shapes["route"], generator=generator)
        tensors["route"] = ways.to(torch.int32).to(device)
    call = Call(spec=spec, tensors=tensors)
    if integers and any(level.score.normalise for level in spec.levels):
        return call.with_tensors(**_two_valued(call))
    return call


def _normal(spec, name, shape, generator):
    if name.endswith("_split"):
        return torch.randint(-1, 48, shape, generator=generator)
    x = torch.randn(shape, generator=generator)
    if name == "gates":
        return x.sigmoid()
    if name.endswith("_weight") and tensor_kinds(spec)[name] == "parameter":
        return x / (shape[1] * shape[2]) ** 0.5
    return x


def _integers(spec, name, shape, generator):
    """Small integers: every product and sum of them is exact in float32."""
    if tensor_kinds(spec)[name] == "parameter":
        return slot_zero(name, shape)
    if name.endswith("_split"):
        return torch.randint(-1, 48, shape, generator=generator)
    if name == "gates":
        return torch.randint(0, 2, shape, generator=generator).float()
    if name in ("z", "z_index") or name.startswith("z_"):  # all tokens weigh the same
        return torch.zeros(shape)
    x = torch.randint(-2, 3, shape, generator=generator).float()
    pooled = any(level.query and level.query.pool == "mean" for level in spec.levels)
    walks = any(level.select and level.select.early_stop for level in spec.levels)
    return x * WHOLE if pooled and name == "q" and not walks else x  # of weights that are no 0


def slot_zero(name, shape):
    """Learned pooling that hands on each entry's first token, and a position of 0."""
    x = torch.zeros(shape)
    if name.endswith("_weight"):
        x[:, 0] = torch.eye(shape[-1])
    return x


def _two_valued(call):
    """Queries and keys whose softmax has equal weights and zeros only, so that its order is exact.

    A mapped level adds weights up; at most one nonzero weight reaches each of its entries, for sums
    in another order round differently.  Where logits have biases too, those of keys without a weight are no
    larger than they must be: they are all that a row may have, and are rounded.
    """
    far = 48.0 if any(branch.bias == "learned" for branch in call.spec.attend) else 240.0
    tensors = {"q": torch.zeros_like(call.tensors["q"])}
    tensors["q"][..., 0] = far
    for level in call.spec.levels:
        if not level.score.normalise:
            continue
        strides = [
            other.partition.stride // level.partition.stride
            for other in call.spec.levels
            if other.score.source == level.name
        ]
        ratio = max([2, *strides])
        name = f"k_{level.kv}" if level.kv else "k"
        keys = torch.zeros_like(call.tensors[name])
        entry = torch.arange(keys.shape[1])
        if call.spec.axes:
            entry = tile_of(entry, call.spec.axes, level.permute.keys.tile)
        elif level.partition.stride:  # of clusters, tokens themselves are of two kinds
            entry //= level.partition.stride
        for head in range(keys.shape[2]):
            favoured = entry % (2 * ratio) == (1 + head * (ratio - 2)) % ratio
            keys[:, :, head, 0] = torch.where(favoured, 0.0, -far).to(keys)
        tensors[name] = keys
    return tensors


# --- the same numbers, elsewhere in memory


def head_major(x):
    """As transformers hands tensors over: heads outside tokens in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x


def guarded(x, *, extra=5, fill=float("nan")):
    """A view inside a larger tensor that holds `fill` all around."""
    *outer, last = x.shape
    fill = fill if x.is_floating_point() else 1 << 20
    room = torch.full([n + 2 for n in outer] + [last + extra], fill, dtype=x.dtype, device=x.device)
    view = room[(*(slice(1, n + 1) for n in outer), slice(0, last))]
    return view.copy_(x)


def placed(call, how):
    """Move every tensor but learned ones to where `how` says."""
    kinds = tensor_kinds(call.spec)
    return call.with_tensors(
        **{name: t if kinds[name] == "parameter" else how(t) for name, t in call.tensors.items()}
    )


# --- documents


def pack(spec, lengths, *, key_lengths=None, dtype, seed=0, device="cpu", integers=False):
    """Documents one after another, and the same ones as calls of their own."""
    key_lengths = key_lengths or lengths
    kinds = tensor_kinds(spec)
    shared = make(spec, T=1, dtype=dtype, seed=seed, device=device, integers=integers).tensors
    shared = {name: t for name, t in shared.items() if kinds[name] == "parameter"}
    alone = [
        make(spec, T=T, S=S, dtype=dtype, seed=seed + z + 1, device=device, integers=integers)
        for z, (T, S) in enumerate(zip(lengths, key_lengths, strict=True))
    ]
    alone = [call.with_tensors(**shared) for call in alone]
    joined = {
        name: torch.cat([x if kind == "sequence" else x[0] for x in parts])
        for name, kind in kinds.items()
        if kind != "parameter" and (parts := [call.tensors[name] for call in alone])
    }
    options = {"cu_seqlens_q": _ends(lengths, device), "cu_seqlens_k": _ends(key_lengths, device)}
    return Call(spec=spec, tensors=joined | shared, options=options), alone


def _ends(lengths, device):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(torch.int32).to(device)


def key_side(call):
    """Every tensor with one row a key."""
    kinds = tensor_kinds(call.spec)
    return {name: t for name, t in call.tensors.items() if kinds[name] == "key"}


def value_side(call):
    """Every tensor of values: [B, S, Hkv, Dv]; of a latent branch its keys, which hold them."""
    kinds = tensor_kinds(call.spec)
    latent = {f"k_{b.kv}" if b.kv else "k" for b in call.spec.attend if b.storage}
    return {
        name: t
        for name, t in call.tensors.items()
        if kinds[name] == "key" and (name == "v" or name.startswith("v_") or name in latent)
    }


def batched(call):
    """Names of the tensors that have a batch."""
    return {name for name, kind in tensor_kinds(call.spec).items() if kind != "parameter"}
