"""What is known of one tuned problem: frozen nouns, their JSON line, and what a line must be.

Reads no file and knows no GPU: a record that was never measured is as good as one that was.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from hsgen import planner
from hsgen.configs import Sizes
from hsgen.errors import HsgenError
from hsgen.spec import Spec

SCHEMA = 1
MAX_ALTERNATES = 5
MAX_LINE = 1 << 16  # characters of a record's line
WARPS = (1, 2, 4, 8, 16, 32)
LAUNCH = ("num_warps", "num_stages")  # of every config, beside its constexprs

R = TypeVar("R")
DType = Literal["bf16", "fp16", "fp32"]
Work = Literal["forward", "gradients", "decode"]
Order = Literal["rows", "keys"]
Policy = Literal["eager", "graph"]
L2 = Literal["warm", "cold"]


class RecordError(HsgenError):
    """A line that is no record: `field` says where, as kernels.score.config."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.field = where


# --- what a value may be, so that a slip of a hand-edited file is found before a kernel is launched


def _power(number: int) -> int:
    if number & (number - 1):
        raise ValueError(f"expected a power of two, got {number}")
    return number


def _config(values: Mapping[str, int]) -> Mapping[str, int]:
    for name in LAUNCH:
        if name not in values:
            raise ValueError(f"expected {name}")
    if values["num_warps"] not in WARPS:
        raise ValueError(f"num_warps: expected one of {WARPS}, got {values['num_warps']}")
    if values["num_stages"] > 16:
        raise ValueError(f"num_stages: expected at most 16, got {values['num_stages']}")
    return values


Word = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.+-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]
SpecName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
GpuName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
Text = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Power = Annotated[int, Field(ge=1, le=1 << 40), AfterValidator(_power)]
Bytes = Annotated[int, Field(ge=0, le=1 << 40)]
Value = Annotated[int, Field(ge=0, le=1 << 20)]  # Triton refuses larger tiles
Config = Annotated[Mapping[Name, Value], AfterValidator(_config)]
Configs = Mapping[Name, Config]
Orders = Mapping[Name, Order]
Microseconds = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
Figure = Text | bool | int | Annotated[float, Field(allow_inf_nan=False)]


# --- nouns


class Closed:
    """A line has no field but those of the nouns."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Closed):
    """What is computed: a spec's name and canonical meaning, bound, and the tensors' dtype.

    `heads` are of queries and of keys, `head_dim` of q and k, and of v.  `work`: a call, its gradients, or a
    step behind a cache, with pages of `page` tokens or with none; a line says what is not a call's.
    """

    spec: SpecName
    digest: Digest
    dtype: DType
    heads: tuple[Count, Count]
    head_dim: tuple[Count, Count]
    work: Work = "forward"
    page: Annotated[int, Field(ge=0, le=1 << 20), AfterValidator(_power)] = 0

    @classmethod
    def of(cls, spec: Spec, dtype: DType, work: Work = "forward", page: int = 0) -> Problem:
        """The problem of a spec whose heads and head dims are bound; its losses are no part of a call."""
        spec = planner.without_losses(spec)
        assert spec.heads, f"{spec.name}: heads are not bound"
        assert spec.head_dim, f"{spec.name}: head dims are not bound"
        return cls(
            spec=spec.name,
            digest=spec.digest,
            dtype=dtype,
            heads=(spec.heads.query, spec.heads.kv),
            head_dim=(spec.head_dim.qk, spec.head_dim.v),
            work=work,
            page=page,
        )

    def said(self) -> dict[str, object]:
        """The same for JSON, without what a line leaves out."""
        usual = (("work", "forward"), ("page", 0))
        return {name: x for name, x in asdict(self).items() if (name, x) not in usual}

    def __str__(self) -> str:
        heads, dims = ("/".join(map(str, pair)) for pair in (self.heads, self.head_dim))
        work = "" if self.work == "forward" else f", {self.work}"
        work += f", pages of {self.page}" if self.page else ""
        return f"{self.spec} {self.digest[:12]} {self.dtype}, heads {heads}, head dim {dims}{work}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket(Closed):
    """How large a call is, each number the power of two at or above it.

    From shapes alone, which a call's signature holds: `queries` rows of all sequences, `keys` that
    a sequence has room for (packed: of all of them), `sequences`.  Lengths that are numbers change
    no configuration, so that nothing compiles as they grow.
    """

    queries: Power
    keys: Power
    sequences: Power
    packed: bool

    @classmethod
    def of(cls, rows: int, keys: int, sequences: int, packed: bool) -> Bucket:
        """The bucket of a call."""
        return cls(
            queries=_at_least(rows),
            keys=_at_least(keys),
            sequences=_at_least(sequences),
            packed=packed,
        )

    @classmethod
    def of_steps(cls, sizes: Sizes) -> Bucket:
        """The bucket of steps: each sequence has as many rows as the power of two at or above its tokens."""
        sequences = _at_least(sizes.sequences)
        rows = sequences * _at_least(sizes.tokens)
        return cls.of(rows, sizes.keys, sequences, packed=False)

    def sizes(self, page: int = 0) -> Sizes:
        """Of steps, the largest of the bucket."""
        tokens = max(1, self.queries // self.sequences)
        return Sizes(tokens=tokens, keys=self.keys, sequences=self.sequences, page=page)

    def distance(self, other: Bucket) -> int:
        """Steps of two between them, of all axes; packed or not is eight."""
        mine, its = self._axes(), other._axes()
        steps = (abs(a.bit_length() - b.bit_length()) for a, b in zip(mine, its, strict=True))
        return sum(steps) + 8 * (self.packed != other.packed)

    def _axes(self) -> tuple[int, int, int]:
        return self.queries, self.keys, self.sequences

    def __str__(self) -> str:
        packed = " packed" if self.packed else ""
        axes = (self.queries, self.keys, self.sequences)
        return "{} queries, {} keys, {} sequences".format(*map(_short, axes)) + packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Closed):
    """Where and how it was timed: what decides which configuration is best.

    `gpu` is a canonical id of gpus.yaml; `triton` has two numbers.  `policy` is how calls were
    made, `l2` whether the cache held their tensors.  Other versions are provenance.
    """

    gpu: GpuName
    sm: Word
    processors: Count
    shared_memory: Count
    triton: Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]
    policy: Policy = "eager"
    l2: L2 = "warm"

    @property
    def card(self) -> tuple[str, str, int, int]:
        """All of the GPU."""
        return self.gpu, self.sm, self.processors, self.shared_memory

    @property
    def triton_numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.triton.split(".")))

    def __str__(self) -> str:
        return f"{self.gpu} ({self.sm}), Triton {self.triton}, {self.policy}, {self.l2} L2"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice(Closed):
    """One kernel's full parameters, of which text, and what the compiler made of it.

    `text` digests the emitted module without comments and docstrings (see `build.text_digest`);
    `shared` bytes a block, `registers` and `spills` (bytes) a thread.
    """

    text: Digest
    config: Config
    shared: Bytes
    registers: Bytes
    spills: Bytes = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Time(Closed):
    """Of whole calls, in microseconds: the median, the middle half's width, how many."""

    median_us: Microseconds
    iqr_us: Spread
    runs: Count

    @property
    def noise(self) -> float:
        """The relative uncertainty of the median."""
        return self.iqr_us / self.median_us

    def __str__(self) -> str:
        return f"{self.median_us:.4g} us (IQR {self.iqr_us:.2g}, {self.runs} runs)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternate(Closed):
    """Another choice, and its time as a multiple of the winner's."""

    kernels: Configs
    ratio: Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
    orders: Orders = field(default_factory=dict[str, Order])


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance(Closed):
    """Where a record comes from.  Compared by people, not by `look_up`."""

    hsgen: Text
    torch: Text
    driver: Text | None
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}([T ][0-9:.+Z-]{1,32})?$")]
    trials: Annotated[int, Field(ge=0, le=1 << 40)]
    command: Text
    cuda: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned(Closed):
    """One record: the fastest configuration of a problem that was found and verified.

    Attributes:
        orders: by branch, where they are not the plan's own; they decide the plan.
        kernels: by name.
        time: of the whole call.
        default: of the whole call with the starting configurations, in the same finals.
        check: what was verified before anything was timed.
        alternates: near-ties, fastest first.
    """

    problem: Problem
    bucket: Bucket
    environment: Environment
    kernels: Annotated[Mapping[Name, KernelChoice], Field(min_length=1)]
    time: Time
    default: Time
    provenance: Provenance
    orders: Orders = field(default_factory=dict[str, Order])
    check: Mapping[Name, Figure] = field(default_factory=dict[str, Figure])
    alternates: Annotated[tuple[Alternate, ...], Field(max_length=MAX_ALTERNATES)] = ()
    schema: Literal[1] = SCHEMA

    @property
    def key(self) -> str:
        """24 hex digits of problem, bucket and environment."""
        parts = [self.problem.said(), asdict(self.bucket), asdict(self.environment)]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def place(self) -> tuple[object, ...]:
        """Sorts the records of a file: kinds of tensors, then sizes, then versions."""
        problem, bucket, environment = self.problem, self.bucket, self.environment
        sizes = (bucket.packed, bucket.keys, bucket.queries, bucket.sequences)
        versions = (environment.triton_numbers, environment.policy, environment.l2)
        tensors = (
            problem.work,
            problem.page,
            problem.heads,
            problem.head_dim,
            problem.dtype,
            problem.digest,
        )
        return *tensors, *sizes, *versions, *environment.card

    @property
    def configs(self) -> dict[str, dict[str, int]]:
        """By kernel, keyword arguments of a launch."""
        return {name: dict(choice.config) for name, choice in self.kernels.items()}

    @property
    def speedup(self) -> float:
        """Over the starting configurations."""
        return self.default.median_us / self.time.median_us

    def __str__(self) -> str:
        gain = f"{self.speedup:.2f} times as fast as the start"
        lines = [f"{self.problem}; {self.bucket}; {self.environment}", f"  {self.time}, {gain}"]
        lines += [f"  {branch}: {order} stay" for branch, order in self.orders.items()]
        for name, choice in self.kernels.items():
            words = " ".join(f"{what}={value}" for what, value in choice.config.items())
            lines.append(f"  {name}: {words}")
        return "\n".join(lines)


# --- JSON

ORDER = (
    *("schema", "problem", "bucket", "environment", "orders", "kernels", "time", "default"),
    *("check", "alternates", "provenance"),
)


def dump(record: Tuned) -> str:
    """A record as one line of JSON, the same each time.

    Raises:
        RecordError: a value that no line may have.
    """
    values = asdict(record)
    values["problem"] = record.problem.said()
    values["kernels"] = dict(sorted(values["kernels"].items()))
    try:
        text = json.dumps({name: values[name] for name in ORDER}, allow_nan=False)
    except ValueError as error:
        raise RecordError("", str(error)) from error
    read(text)
    return text


def read(line: str | bytes) -> Tuned:
    """The record of a line.

    Raises:
        RecordError: what is wrong with it, and in which field.
    """
    return read_as(line, _adapter())


def read_as(line: str | bytes, adapter: TypeAdapter[R]) -> R:
    """The noun of a line, of this schema.

    Raises:
        RecordError: what is wrong with it, and in which field.
    """
    if len(line) > MAX_LINE:
        raise RecordError("", f"expected at most {MAX_LINE} characters, got {len(line)}")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError("", f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RecordError("", f"expected an object, got {type(data).__name__}")
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise RecordError("schema", f"expected {SCHEMA}, got {schema}: a newer hsgen wrote it")
    try:
        return adapter.validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.60}"
        raise RecordError(where, f"{message[:1].lower()}{message[1:]}{got}") from error


@functools.cache
def _adapter() -> TypeAdapter[Tuned]:
    return TypeAdapter(Tuned)


def _at_least(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _short(number: int) -> str:
    return f"{number >> 10}K" if number >= 1 << 10 else str(number)
