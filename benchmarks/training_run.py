"""A small language model trained from scratch by each system, on the same text and on a task of recall.

    python -m benchmarks.training_run --device cuda --steps 500 --seconds 28 -o OUT
    python -m benchmarks.training_run --device cuda --tokens 512 --reference -o OUT   # without kernels too
    python -m benchmarks.training_run --report       # writes docs/training_run.md and docs/training_run.svg

The model is examples/language_model.py.  A system whose gradients or losses no kernel makes is written down
in the kernel's own words, and trained by the reference only where `--reference` says so: attention too where
its gradients are missing, else the loss alone.  On a CPU all attention is the reference's, unless
`--interpret` asks for kernels.  Results are on disk after each training;
a second call with the same settings and folder goes on from them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Json
from examples.language_model import LanguageModel, Size
from hsgen import load_kernel, machine
from hsgen.errors import HsgenError
from hsgen.perplexity import manual
from hsgen.plots import Line, Panel, draw
from hsgen.reference import tensor_shapes
from hsgen.spec import Blocks, HeadDim, Heads, Index, Kl, LearnedTree, Loss, Spec, load

DOCS = common.ROOT / "docs"
EVALUATIONS = 10  # of a training, at even steps
HELD = 16  # windows of held-out text
SYMBOLS = (
    64  # keys of the task of recall, and as many values: few, to be learnt in a short training
)
ASKED = 8  # sequences for each number of pairs
RATE, LEAST_RATE = 1e-3, 0.1
IGNORED = -100  # a target that there is none

Batch = tuple[Tensor, Tensor]  # i64[B, T] tokens, and what is to be said behind each


# What layers attend by ------------------------------------------------------------------------------


def _nsa(tokens: int) -> Spec:
    """Authors train 8,192 tokens."""
    part = max(1, 8192 // tokens)
    block = max(16, 64 // part)
    spec = common.with_blocks(load("nsa"), "compressed", block // 2, block // 4)
    spec = common.with_blocks(spec, "block", block)
    count = max(4, tokens // 8 // block)
    near = [
        x.model_copy(update={"window": max(16, 512 // part)}) if x.window else x
        for x in spec.attend
    ]
    return common.with_budget(spec, "block", count).model_copy(update={"attend": tuple(near)})


def _moba(tokens: int) -> Spec:
    """The scaling runs of its authors: 3 of 16 chunks."""
    return common.with_blocks(load("moba"), "chunk", max(16, tokens // 16))


def _hisa(tokens: int) -> Spec:
    """Of 32,768 tokens its authors look into a quarter and attend to a sixteenth; an index of few heads.

    The loss is that of the index it has from DSA, over all that is looked into.
    """
    block = max(16, tokens // 128)
    spec = common.with_blocks(load("hisa"), "block", block)
    spec = common.with_budget(spec, "block", max(2, tokens // 4 // block))
    spec = common.with_budget(spec, "token", max(16, tokens // 16))
    learnt = {"index": Index(heads=4, dim=64), "loss": Loss(kl=Kl(level="token"))}
    return spec.model_copy(update=learnt)


def _hirouter(tokens: int) -> Spec:
    """Leaves of 64 tokens in the mean, of which a row reaches 8, and of their tokens it attends to half."""
    spec = load("hirouter")
    wide = max(2, round((tokens / 64) ** 0.5))
    levels = (
        x.model_copy(update={"partition": x.partition.model_copy(update={"branching": wide})})
        if isinstance(x.partition, LearnedTree)
        else x
        for x in spec.levels
    )
    spec = spec.model_copy(update={"levels": tuple(levels)})
    spec = common.with_budget(spec, "branch", min(4, wide))
    spec = common.with_budget(spec, "leaf", min(8, wide * wide // 2))
    return common.with_budget(spec, "token", max(16, tokens // 16))


SYSTEMS: Mapping[str, Callable[[int], Spec] | None] = {
    "dense": None,
    "nsa": _nsa,
    "moba": _moba,
    "hisa": _hisa,
    "hirouter": _hirouter,
}


def system(name: str, tokens: int, size: Size) -> Spec | None:
    """A system's spec at so many tokens, with the model's heads; None is dense."""
    make = SYSTEMS[name]
    if make is None:
        return None
    query, kv = size.heads
    heads = {"heads": Heads(query=query, kv=kv), "head_dim": HeadDim(qk=size.dim, v=size.dim)}
    return make(tokens).model_copy(update=heads)


def sizes(spec: Spec) -> str:
    """What of a spec goes with the length of texts, in a line."""
    words: list[str] = []
    for level in spec.levels:
        match level.partition:
            case Blocks(size=size, stride=stride):
                entry = f"blocks of {size}" + (f" every {stride}" if stride != size else "")
            case LearnedTree(branching=wide):
                entry = f"{wide} children a node"
            case _:
                entry = ""
        kept = level.select and (level.select.top_k or level.select.beam)
        said = [*filter(None, (entry, f"{kept} kept" if kept else ""))]
        words.append(": ".join([level.name, ", ".join(said)]))
    words += [f"window: {x.window}" for x in spec.attend if x.window]
    return "; ".join(words)


def refusals(spec: Spec, device: str, *, interpret: bool) -> dict[str, str]:
    """What of a training no kernel does, `attention` or `losses`, in the words of the kernels."""
    kernel, found = load_kernel(spec, interpret=interpret), dict[str, str]()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = {
        name: torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        for name, shape in tensor_shapes(spec, 1, 64, 64).items()
    }
    calls = {"attention": kernel} | ({"losses": kernel.losses} if spec.loss else {})
    for what, call in calls.items():
        try:
            call(**tensors)
        except HsgenError as error:
            found[what] = error.message
    return found


# What is learnt -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Batches to train on, drawn by a generator, and what is measured of a model."""

    vocabulary: int
    draw: Callable[[torch.Generator], Batch]
    measure: Callable[[Callable[[Tensor], Tensor]], Json]


def library() -> list[bytes]:
    """Python's language reference by topic, and the modules of its library that are no packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return [*topics(), *modules]


def topics() -> list[bytes]:
    """The language reference, in parts as long as a topic is."""
    text = manual().encode()
    return [text[i : i + 16384] for i in range(0, len(text), 16384)]


TEXTS: Mapping[str, Callable[[], list[bytes]]] = {"library": library, "manual": topics}


def split(documents: Sequence[bytes]) -> tuple[bytes, bytes]:
    """What is trained on, and every tenth document, which is not."""
    found: tuple[list[bytes], list[bytes]] = [], []
    for i, each in enumerate(documents):
        found[i % 10 == 9].append(each)
    kept, held = (b"\n\n".join(some) for some in found)
    return kept, held


def reading(documents: Sequence[bytes], tokens: int, batch: int, device: str) -> Task:
    """Bytes of a text, each said from those before it."""
    texts = split(documents)
    if min(map(len, texts)) <= tokens + HELD:
        raise HsgenError(
            f"text: expected more than {tokens} bytes to train on and to hold out, "
            f"got {len(texts[0])} and {len(texts[1])}"
        )
    kept, held = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)

    def windows(text: Tensor, starts: Sequence[int]) -> Batch:
        found = torch.stack([text[i : i + tokens + 1] for i in starts]).to(device).long()
        return found[:, :-1], found[:, 1:]

    def drawn(generator: torch.Generator) -> Batch:
        starts = torch.randint(len(kept) - tokens, (batch,), generator=generator)
        return windows(kept, starts.tolist())

    def measure(say: Callable[[Tensor], Tensor]) -> Json:
        starts = [i * (len(held) - tokens - 1) // (HELD - 1) for i in range(HELD)]
        bits = 0.0
        for i in range(0, HELD, batch):
            x, y = windows(held, starts[i : i + batch])
            bits += float(_bits(say(x), y)) * len(x) / HELD
        return {"bits": bits}

    return Task(vocabulary=256, draw=drawn, measure=measure)


def recalling(tokens: int, batch: int, device: str) -> Task:
    """Pairs are told at random places of a text's first half; the second half asks for them."""
    numbers = pairs(tokens)

    def drawn(generator: torch.Generator) -> Batch:
        which = torch.randint(len(numbers), (batch,), generator=generator).tolist()
        some = [told_and_asked(numbers[i], tokens, generator) for i in which]
        x, y, _ = (torch.stack(each).to(device) for each in zip(*some, strict=True))
        return x, y

    def measure(say: Callable[[Tensor], Tensor]) -> Json:
        found: Json = {}
        for count in numbers:
            generator = torch.Generator().manual_seed(10_000 + count)
            hits: list[Tensor] = []
            for i in range(0, ASKED, batch):
                some = [
                    told_and_asked(count, tokens, generator) for _ in range(min(batch, ASKED - i))
                ]
                x, y, first = (torch.stack(each).to(device) for each in zip(*some, strict=True))
                hits.append((say(x).argmax(-1) == y)[first])
            found[str(count)] = float(torch.cat(hits).float().mean())
        return {"accuracy": found}

    return Task(vocabulary=2 * SYMBOLS + 1, draw=drawn, measure=measure)


def pairs(tokens: int) -> list[int]:
    """Numbers of pairs that are told."""
    return [4**i for i in range(1, 5) if 4**i <= min(SYMBOLS, tokens // 16)]


def told_and_asked(
    count: int, tokens: int, drawn: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One text of recall.

    Returns:
        i64[T] tokens: keys from 0, values from SYMBOLS, and between told pairs 2 SYMBOLS.
        i64[T] targets: behind each key that is asked for its value, else IGNORED.
        bool[T]: where a key is asked for the first time, so that only its telling answers it.
    """
    slots = tokens // 4
    keys = torch.randperm(SYMBOLS, generator=drawn)[:count]
    values = SYMBOLS + torch.randint(SYMBOLS, (count,), generator=drawn)
    places = torch.randperm(slots, generator=drawn)[:count]
    asked = torch.randint(count, (slots,), generator=drawn)
    text = torch.full((tokens,), 2 * SYMBOLS)
    text[2 * places], text[2 * places + 1] = keys, values
    at = 2 * slots + 2 * torch.arange(slots)
    text[at], text[at + 1] = keys[asked], values[asked]
    targets = torch.full((tokens,), IGNORED)
    targets[at] = values[asked]
    order = torch.arange(slots)
    earliest = torch.full((count,), slots).scatter_reduce(0, asked, order, "amin")
    first = torch.zeros(tokens, dtype=torch.bool)
    first[at] = order == earliest[asked]
    return text, targets, first


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean surprise in bits, where there is a target.  -> f32[]"""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
    return nats / math.log(2)


# Training -------------------------------------------------------------------------------------------


def train(
    model: LanguageModel, task: Task, args: argparse.Namespace, seed: int, steps: int
) -> Json:
    """Steps up to a number or a time; evaluations and the first call, which compiles, are not timed."""
    cuda = args.device == "cuda"
    network: Any = torch.compile(model) if args.compile else model
    weights = list(model.parameters())
    groups = [
        {"params": [x for x in weights if x.ndim > 1], "weight_decay": 0.1},
        {"params": [x for x in weights if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    drawn = torch.Generator().manual_seed(seed)

    def wide() -> AbstractContextManager[object]:
        return torch.autocast(args.device, torch.bfloat16, enabled=cuda)

    def backward(batch: Batch) -> Tensor:
        tokens, targets = batch
        with wide():
            logits, own = network(tokens)
            bits = _bits(logits, targets)
        (bits * math.log(2) + own).backward()
        return torch.stack((bits.detach(), own.detach().float()))

    @torch.no_grad()
    def measured() -> Json:
        def say(tokens: Tensor) -> Tensor:
            with wide():
                return network(tokens)[0].float()

        model.eval()
        found = task.measure(say)
        model.train()
        return found

    backward(task.draw(torch.Generator().manual_seed(seed)))  # compiles
    optimizer.zero_grad()
    record: Json = {"curve": [], "measured": [], "weights": sum(x.numel() for x in weights)}
    every = max(1, steps // EVALUATIONS)
    begun, spent, step, peak = _clock(args.device), 0.0, 0, 0
    while step < steps and _clock(args.device) - begun < args.seconds:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started, losses = _clock(args.device), list[Tensor]()
        while len(losses) < min(every, steps - step):
            if time.perf_counter() - begun > args.seconds and losses:
                break
            losses.append(backward(task.draw(drawn)))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        step += len(losses)
        said = torch.stack(losses).mean(0).tolist()
        spent += _clock(args.device) - started
        peak = max(peak, torch.cuda.max_memory_allocated() if cuda else 0)
        if not math.isfinite(sum(said)):
            raise HsgenError(f"step {step}: expected a loss, got {said}")
        record["curve"].append([step, *said])
        record["measured"].append([step, measured()])
    record |= {"steps": step, "tokens_per_s": step * args.batch * args.tokens / spent}
    record |= {"seconds": _clock(args.device) - begun, "peak_bytes": peak or None}
    return record


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up over a tenth of the steps, then down along a cosine."""
    up = min(1.0, (step + 1) / max(1, steps // 10))
    down = 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
    return up * (LEAST_RATE + (1 - LEAST_RATE) * down)


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _short(error: Exception) -> str:
    said = error.message if isinstance(error, HsgenError) else str(error)
    return machine.without_paths((said.splitlines() or [""])[0])[:200]


# Running --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every training that is not there yet; what fails is written down."""
    documents = TEXTS[args.text]()
    size = Size(layers=args.layers, width=args.width, heads=tuple(args.heads), dim=args.dim)
    about = {"device": args.device, "tokens": args.tokens, "batch": args.batch, "steps": args.steps}
    about |= {"recall_steps": args.recall_steps or args.steps}
    about |= {"layers": size.layers, "width": size.width, "heads": list(size.heads)}
    about |= {"dim": size.dim, "rate": args.rate, "compile": args.compile, "text": args.text}
    about |= {
        "bytes": sum(map(len, documents)),
        "digest": hashlib.sha256(b"".join(documents)).hexdigest()[:16],
    }
    made = common.provenance("benchmarks.training_run", argv, args.device)
    name = f"training_run_{common.slug(str(made['card']))}_{args.tokens}_{made['date']}.json"
    path = args.output / name
    commands, records = _before(path, about)
    commands = [*commands, made.pop("command")]
    tasks = {
        "text": reading(documents, args.tokens, args.batch, args.device),
        "recall": recalling(args.tokens, args.batch, args.device),
    }
    for case in _cases(args):
        if any(_case(old) == case and _stands(old, args) for old in records):
            continue
        record = _record(case, size, tasks[case[1]], args)
        records = [*(old for old in records if _case(old) != case), record]
        data = {"made": made, "commands": commands, **about, "records": records}
        common.write_json(path, data)
        brief = {key: x for key, x in record.items() if key not in ("curve", "measured")}
        print(brief, *record.get("measured", [])[-1:], flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return path


def _cases(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.systems:
                yield name, task, seed


def _case(record: Json) -> tuple[str, str, int]:
    return record["system"], record["task"], record["seed"]


def _stands(record: Json, args: argparse.Namespace) -> bool:
    """Whether a record of an earlier call is not made again."""
    return "steps" in record or ("failed" not in record and not args.reference)


def _before(path: Path, about: Json) -> tuple[list[str], list[Json]]:
    """Commands and records of an earlier call of the day, which had the same settings."""
    if not path.exists():
        return [], []
    old = common.read_json(path)
    for key, value in about.items():
        if old.get(key) != value:
            raise HsgenError(
                f"{path.name}: expected results with {key} {value}, got {old.get(key)}",
                help="-o names another folder",
            )
    return old["commands"], old["records"]


def _record(case: tuple[str, str, int], size: Size, task: Task, args: argparse.Namespace) -> Json:
    """One training, or why there is none."""
    name, what, seed = case
    steps = args.recall_steps or args.steps if what == "recall" else args.steps
    record: Json = dict(zip(("system", "task", "seed"), case, strict=True))
    spec = system(name, args.tokens, size)
    path, losses = "sdpa", "kernels"
    if spec is not None:
        record["sizes"] = sizes(spec)
        by_kernels = args.device == "cuda" or args.interpret
        path = "kernels" if by_kernels else "reference"
        if by_kernels and (words := refusals(spec, args.device, interpret=args.interpret)):
            record["refused"] = [*words.values()]
            if not args.reference:
                return record
            if "attention" in words:
                path = "reference"
            else:
                record["losses"] = losses = "reference"
    record["attention"] = path
    try:
        model = LanguageModel(
            Size(
                vocabulary=task.vocabulary,
                layers=size.layers,
                width=size.width,
                heads=size.heads,
                dim=size.dim,
            ),
            spec,
            plain=path == "reference",
            plain_losses=losses == "reference",
            interpret=args.interpret,
            seed=seed,
        ).to(args.device)
        record |= train(model, task, args, seed, steps)
    except Exception as error:  # noqa: BLE001  the others go on
        record["failed"] = f"{type(error).__name__}: {_short(error)}"
    return record


# The page -------------------------------------------------------------------------------------------

HEAD = """# A training run

The model of [examples/language_model.py](../examples/language_model.py) learns from scratch, once by each
system: the same weights to begin with, the same batches, AdamW under one schedule.  *Bits a byte* is what it
says of text that was held out, every tenth document; *beside dense* is how many more bits than dense
attention needs.  *Recall* is another training of the same model: pairs of a key and a value are told at
random places of a text's first half, its second half asks for the values; shares of right answers where a
pair is asked for the first time, by number of pairs.  Chance is {chance:.1%}.  Tokens a second and peak
memory are of the training on text: forward, backward and optimizer, without evaluations and what compiles.

Blocks, windows and budgets are shares of a text as their authors have them, but no block has fewer than 16
tokens, and of hirouter's only the abstract is public.  hisa learns its index by KL against attention over the
tokens that it looks into, hirouter its tree by dual entropy.  Where kernels lack a gradient or a loss the
column *attention* says so: *none* was not trained; *reference* is plain PyTorch, for all of it or for the
loss alone, whose rates and memory say nothing of kernels.  A run on a CPU is of a toy: it shows that all of
them train, not how well.

![held-out bits by step, recall by pairs](training_run.svg)

"""


def page(results: Sequence[Json]) -> str:
    """docs/training_run.md."""
    return HEAD.format(chance=1 / SYMBOLS) + "\n".join(map(_section, results))


def _section(result: Json) -> str:
    """One run: its table, what was refused, how to make it again."""
    made, records = result["made"], result["records"]
    numbers = pairs(result["tokens"])
    query, kv = result["heads"]
    planned = {"text": result["steps"], "recall": result["recall_steps"]}
    parts = [
        f"## {made['card']}, {result['tokens']:,} tokens\n\n",
        f"{result['layers']} layers of width {result['width']}, {query}/{kv} heads of {result['dim']}; ",
        f"batches of {result['batch']}; {planned['text']:,} steps, {planned['recall']:,} of recall; ",
        f"{result['bytes'] / 1e6:.1f} MB of text, {TEXT_WORDS[result['text']]}.\n\n",
    ]
    seeds = sorted({record["seed"] for record in records})
    head = ["system", "attention", "steps", "bits a byte", "beside dense"]
    head += [f"recall, {count}" for count in numbers] + ["tokens / s", "peak MiB"]
    rows = [
        _row(f"{name}, seed {seed}" if len(seeds) > 1 else name, found, dense, numbers)
        for name in SYSTEMS
        for seed in seeds
        if (found := _of(records, name, seed))
        for dense in [_of(records, "dense", seed).get("text", {})]
    ]
    parts.append(common.table(head, rows))
    parts += [f"\n- {each}" for each in dict.fromkeys(_remarks(records, planned))]
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(result["commands"]))
    versions = f"Python {made['python']}, torch {made['torch']}, Triton {made['triton']}"
    parts.append(f"\n\n{made['date']}, {versions}, text {result['digest']}: {commands}\n")
    return "".join(parts)


TEXT_WORDS = {
    "library": "Python's language reference and the modules of its library",
    "manual": "Python's language reference",
}


def _of(records: Sequence[Json], name: str, seed: int) -> dict[str, Json]:
    """Records of one system by task."""
    return {x["task"]: x for x in records if (x["system"], x["seed"]) == (name, seed)}


def _row(name: str, found: Mapping[str, Json], dense: Json, numbers: Sequence[int]) -> list[str]:
    text, recall = found.get("text", {}), found.get("recall", {})
    any_of = text or recall
    attention = "none" if "refused" in any_of and "attention" not in any_of else any_of["attention"]
    attention += ", loss: reference" if "losses" in any_of else ""
    bits, beside = _last(text, "bits"), _last(dense, "bits")
    if text is dense or text.get("steps") != dense.get("steps"):  # one was cut short
        beside = None
    shares = _last(recall, "accuracy") or {}
    peak, steps = text.get("peak_bytes"), text.get("steps", recall.get("steps"))
    return [
        name,
        attention,
        common.number(steps),
        common.MISSING if bits is None else f"{bits:.3f}",
        common.MISSING if bits is None or beside is None else f"{bits - beside:+.3f}",
        *(f"{shares[str(n)]:.1%}" if str(n) in shares else common.MISSING for n in numbers),
        common.number(text.get("tokens_per_s")),
        common.number(peak / 2**20 if peak else None),
    ]


def _last(record: Json, what: str) -> Any:
    """What was measured after the last step."""
    return record["measured"][-1][1].get(what) if record.get("measured") else None


def _remarks(records: Sequence[Json], planned: Mapping[str, int]) -> Iterator[str]:
    for record in records:
        name = record["system"]
        if "sizes" in record:
            yield f"{name}: {record['sizes']}"
    for record in records:
        name, task = record["system"], record["task"]
        for words in record.get("refused", ()):
            yield f"on kernels: {words}"
        if "failed" in record:
            yield f"{name}, {task}: failed, {record['failed']}"
        if record.get("steps", planned[task]) < planned[task]:
            done = f"{record['steps']:,} of {planned[task]:,} steps"
            yield f"{name}, {task}: {done} when its time was over"


def plot(results: Sequence[Json]) -> str:
    """docs/training_run.svg, of the run on a card, if there is one, with most tokens."""
    result = max(results, key=lambda x: (x["device"] == "cuda", x["tokens"]))
    seed = min(record["seed"] for record in result["records"])
    texts, recalls = list[Line](), list[Line]()
    for name in SYSTEMS:
        found = _of(result["records"], name, seed)
        dashed = name == "dense"
        if curve := found.get("text", {}).get("measured"):
            points = tuple((float(step), said["bits"]) for step, said in curve)
            texts.append(Line(name=name, points=points, dashed=dashed))
        if shares := _last(found.get("recall", {}), "accuracy"):
            # axes are logarithmic: nothing right is drawn as a tenth of a percent
            points = tuple((float(n), max(100 * x, 0.1)) for n, x in shares.items())
            recalls.append(Line(name=name, points=points, dashed=dashed))
    panels = [
        Panel(title=title, lines=tuple(lines), marks={})
        for title, lines in (
            ("held-out bits a byte, by step", texts),
            ("% recalled, by pairs", recalls),
        )
        if lines
    ]
    about = (f"{result['made']['card']}, {result['tokens']:,} tokens, {result['layers']} layers",)
    return draw("A small model trained by each system", about, ("", ""), panels)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--tasks", nargs="+", choices=("text", "recall"), default=["text", "recall"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", choices=TEXTS, default="library")
    parser.add_argument("--tokens", type=int, default=4096, help="of a text")
    parser.add_argument("--batch", type=int, default=8, help="texts a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recall-steps", type=int, help="of recall; as many, if nothing is said")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a training, at most")
    parser.add_argument("--rate", type=float, default=RATE, help="the greatest learning rate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 2], help="query and kv")
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--compile", action="store_true", help="the model, by torch.compile")
    parser.add_argument(
        "--reference", action="store_true", help="what kernels refuse is trained by the reference"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="kernels on a CPU, in Triton's interpreter"
    )
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where --report writes")
    parser.add_argument(
        "--report", action="store_true", help="write docs/training_run.md and its plot"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or write the page of what is in the folder of results."""
    args = arguments(argv)
    if args.report:
        kept = sorted(args.output.glob("training_run_*.json"))
        results = [common.read_json(path) for path in kept]
        (args.docs / "training_run.md").write_text(page(results))
        (args.docs / "training_run.svg").write_text(plot(results))
        return 0
    print(run(args, sys.argv[1:] if argv is None else list(argv)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
