"""A GPU as a value: limits that a kernel must fit, and rates that bound its time.

Knows the cards that people name; imports torch only to ask for the card that is present.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal, Protocol

from hsgen.errors import ArgumentError, nearest

Backend = Literal["cuda", "hip"]
MathType = Literal["bf16", "fp16", "fp8", "tf32", "tf32x3", "fp32"]

KIB = 1024
STREAMS_SINCE = (3, 6)  # Triton whose Gluon has warps that do different things on Hopper
STREAMS_UNTIL = (3, 9)  # the first that names what they call otherwise
BINARIES: Mapping[Backend, str] = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One GPU.  Sizes in bytes, rates per second, dense (no structured sparsity).

    An AMD card in these words: `sms` are compute units, a block is a workgroup, a warp a wave,
    shared memory is LDS, registers are vector registers of one lane.

    `arch` is 90 for sm_90, or "gfx942".  `smem_per_block` is what a block gets when it opts in;
    `smem_reserved` is what the system keeps of `smem_per_sm` for each resident block, and
    `smem_unit` what it gives at a time; so too `register_unit`, registers of one lane.
    `scalar_registers_per_sm` is 0 where warps share no registers of their own, `tensor_columns`
    where there is no tensor memory, `peak_fp8` where there are no fp8 units.
    `streams`: kernels may have a warp that streams keys, in Gluon; `with_streams` says where.
    """

    name: str
    backend: Backend
    arch: int | str
    sms: int
    smem_per_block: int
    smem_per_sm: int
    smem_reserved: int
    smem_unit: int
    registers_per_sm: int
    register_unit: int
    scalar_registers_per_sm: int = 0
    tensor_columns: int = 0
    max_warps_per_sm: int
    max_blocks_per_sm: int
    max_threads_per_block: int = 1024
    warp_size: int
    bandwidth: float
    l2_bytes: int
    peak_bf16: float
    peak_fp16: float
    peak_tf32: float
    peak_fp8: float
    peak_fp32: float
    streams: bool = False

    @property
    def label(self) -> str:
        """The architecture as compilers write it: sm_90, gfx942."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def binary(self) -> str:
        """What compilers make for it, as the suffix of a file."""
        return BINARIES[self.backend]

    @property
    def max_warps_per_block(self) -> int:
        return self.max_threads_per_block // self.warp_size

    @property
    def dot_precision(self) -> Literal["tf32x3", "ieee"]:
        """How a dot of float32 keeps its digits: in three passes of TF32, or as it is."""
        return "tf32x3" if self.backend == "cuda" else "ieee"

    @property
    def dots_of_e4m3(self) -> bool:
        """Whether matrix units take e4m3 numbers as they are kept: AMD's have another range here."""
        return self.backend == "cuda" and self.peak_fp8 > 0

    @property
    def dots_read_shared(self) -> bool:
        """Whether matrix units take operands straight from shared memory."""
        return self.label in ("sm_90", "sm_100")

    def peak(self, dtype: MathType) -> float:
        """FLOP/s of matrix multiplies; `tf32x3` is hsgen's fp32 dot, three TF32 passes."""
        match dtype:
            case "bf16":
                return self.peak_bf16
            case "fp16":
                return self.peak_fp16
            case "fp8":
                return self.peak_fp8
            case "tf32":
                return self.peak_tf32
            case "tf32x3":
                return self.peak_tf32 / 3
            case "fp32":
                return self.peak_fp32

    @classmethod
    def named(cls, text: str) -> Target:
        """Find a card by name or architecture: h100, "RTX 4090", sm_80, mi300x.

        Raises:
            ArgumentError: no such card; the message holds the nearest name.
        """
        wanted = _normal(text)
        name = ALIASES.get(wanted, wanted)
        for target in TARGETS:
            if _normal(target.name) == name:
                return target
        known = target_names()
        near = nearest(text.lower(), known)
        hint = f"did you mean {near!r}? " if near else ""
        raise ArgumentError(f"unknown target {text!r}", help=f"{hint}targets: {', '.join(known)}")

    @classmethod
    def of_card(cls, name: str) -> Target:
        """The known kind of a card that a driver names: "NVIDIA H100 80GB HBM3" is an h100.

        Raises:
            ArgumentError: of none.
        """
        found = [target for target in TARGETS if _normal(target.name) in _normal(name)]
        if not found:
            raise ArgumentError(
                f"unknown card {name!r}", help=f"known: {', '.join(target_names())}"
            )
        return max(found, key=lambda target: len(target.name))

    @classmethod
    def current(cls, device: int | None = None) -> Target:
        """Describe the GPU that is present: its own limits, the rates of its kind, what Triton writes for it.

        Raises:
            ArgumentError: torch sees no GPU.
        """
        import torch  # noqa: PLC0415 - a laptop that only compiles never pays for it

        if not torch.cuda.is_available():
            raise ArgumentError("no GPU is present", help="name one, such as 'h100'")
        index = torch.cuda.current_device() if device is None else device
        backend: Backend = "hip" if torch.version.hip else "cuda"
        return with_streams(from_properties(torch.cuda.get_device_properties(index), backend))


def with_streams(target: Target, triton: str | None = None) -> Target:
    """The same GPU with kernels that stream keys, where the installed Triton writes them for it.

    `triton`: a version, in place of the installed one.
    """
    try:
        version = triton or metadata.version("triton")
    except metadata.PackageNotFoundError:
        return target
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    known = STREAMS_SINCE <= numbers < STREAMS_UNTIL
    return replace(target, streams=target.label == "sm_90" and known)


class DeviceProperties(Protocol):
    """What hsgen reads of torch's device properties; older torch lacks some of the rest."""

    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def multi_processor_count(self) -> int: ...


def target_names() -> tuple[str, ...]:
    """Every name that `Target.named` suggests, cards first."""
    return (*(target.name for target in TARGETS), *(f"sm_{arch}" for arch in (80, 89, 90, 100)))


def from_properties(properties: DeviceProperties, backend: Backend) -> Target:
    """Describe a card by what its driver says, and by the nearest known card for the rest.

    The peaks of a part with fewer multiprocessors (MIG slices, PCIe cards) shrink with them.

    Raises:
        ArgumentError: an architecture that hsgen knows nothing of.
    """
    arch = _architecture(properties, backend)
    base = _nearest(properties.name, [target for target in TARGETS if target.arch == arch])
    if base is None:
        labels = ", ".join(sorted({target.label for target in TARGETS}))
        raise ArgumentError(f"{properties.name}: expected one of {labels}, got architecture {arch}")
    sms = properties.multi_processor_count
    share = sms / base.sms
    warps = getattr(properties, "max_threads_per_multi_processor", 0) // base.warp_size
    return replace(
        base,
        name=properties.name,
        sms=sms,
        smem_per_block=getattr(properties, "shared_memory_per_block_optin", 0)
        or base.smem_per_block,
        smem_per_sm=getattr(properties, "shared_memory_per_multiprocessor", 0) or base.smem_per_sm,
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", 0) or base.registers_per_sm,
        max_warps_per_sm=warps or base.max_warps_per_sm,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or base.l2_bytes,
        bandwidth=_bandwidth(properties) or base.bandwidth,
        peak_bf16=base.peak_bf16 * share,
        peak_fp16=base.peak_fp16 * share,
        peak_tf32=base.peak_tf32 * share,
        peak_fp8=base.peak_fp8 * share,
        peak_fp32=base.peak_fp32 * share,
    )


def _architecture(properties: DeviceProperties, backend: Backend) -> int | str:
    if backend == "hip":
        return str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    return properties.major * 10 + properties.minor


def _nearest(name: str, candidates: Sequence[Target]) -> Target | None:
    """The candidate whose name the driver's name contains, else the first."""
    spoken = _normal(name)
    for target in candidates:
        if _normal(target.name) in spoken:
            return target
    return candidates[0] if candidates else None


def _bandwidth(properties: DeviceProperties) -> float:
    """Bytes per second from clock (kHz) and width (bits), two transfers a clock; 0 if unsaid."""
    clock = getattr(properties, "memory_clock_rate", 0)
    width = getattr(properties, "memory_bus_width", 0)
    return 2.0 * clock * 1e3 * width / 8


def _normal(text: str) -> str:
    """Drop what people vary: case, spaces, punctuation, the maker's name."""
    letters = re.sub(r"[^a-z0-9]", "", text.lower())
    return re.sub(r"^(nvidia|amd)?(geforce|instinct)?(?=.)", "", letters)


# Vendor data sheets and tuning guides; fp16 and bf16 with fp32 accumulation.
H100 = Target(
    name="h100",
    backend="cuda",
    arch=90,
    sms=132,
    smem_per_block=227 * KIB,
    smem_per_sm=228 * KIB,
    smem_reserved=KIB,
    smem_unit=128,
    registers_per_sm=65536,
    register_unit=8,
    max_warps_per_sm=64,
    max_blocks_per_sm=32,
    warp_size=32,
    bandwidth=3.35e12,
    l2_bytes=50 * KIB**2,
    peak_bf16=989.4e12,
    peak_fp16=989.4e12,
    peak_tf32=494.7e12,
    peak_fp8=1978.9e12,
    peak_fp32=66.9e12,
)
H200 = replace(H100, name="h200", bandwidth=4.8e12)
A100 = replace(
    H100,
    name="a100",
    arch=80,
    sms=108,
    smem_per_block=163 * KIB,
    smem_per_sm=164 * KIB,
    bandwidth=2.039e12,
    l2_bytes=40 * KIB**2,
    peak_bf16=312e12,
    peak_fp16=312e12,
    peak_tf32=156e12,
    peak_fp8=0.0,
    peak_fp32=19.5e12,
)
RTX4090 = replace(
    H100,
    name="rtx 4090",
    arch=89,
    sms=128,
    smem_per_block=99 * KIB,
    smem_per_sm=100 * KIB,
    max_warps_per_sm=48,
    max_blocks_per_sm=24,
    bandwidth=1.008e12,
    l2_bytes=72 * KIB**2,
    peak_bf16=165.2e12,
    peak_fp16=165.2e12,
    peak_tf32=82.6e12,
    peak_fp8=330.3e12,
    peak_fp32=82.6e12,
)
B200 = replace(
    H100,
    name="b200",
    arch=100,
    sms=148,
    tensor_columns=512,
    bandwidth=8.0e12,
    l2_bytes=126 * KIB**2,
    peak_bf16=2250e12,
    peak_fp16=2250e12,
    peak_tf32=1125e12,
    peak_fp8=4500e12,
    peak_fp32=75e12,
)
MI300X = Target(
    name="mi300x",
    backend="hip",
    arch="gfx942",
    sms=304,
    smem_per_block=64 * KIB,
    smem_per_sm=64 * KIB,
    smem_reserved=0,
    smem_unit=512,
    registers_per_sm=131072,
    register_unit=8,
    scalar_registers_per_sm=3200,
    max_warps_per_sm=32,
    max_blocks_per_sm=32,
    warp_size=64,
    bandwidth=5.3e12,
    l2_bytes=32 * KIB**2,
    peak_bf16=1307.4e12,
    peak_fp16=1307.4e12,
    peak_tf32=653.7e12,
    peak_fp8=2614.9e12,
    peak_fp32=163.4e12,
)
TARGETS = (H100, H200, A100, RTX4090, B200, MI300X)
ALIASES = {
    "sm80": "a100",
    "sm89": "rtx4090",
    "sm90": "h100",
    "sm90a": "h100",
    "sm100": "b200",
    "sm100a": "b200",
    "4090": "rtx4090",
    "gfx942": "mi300x",
}
