"""The README's table: systems beside the best that ran on such a card that day.  Needs no GPU.

    python -m benchmarks.headline      # writes it, with docs/headline.md

Eight are of `benchmarks.speed --systems ...`, kept as speed_ten_CARD_DATE.json, two of
`benchmarks.peers_speed`.  What a later run of the same day has, kept as speed_others_CARD_DATE.json, comes
before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks import common, peer_kernels, speed_report
from hsgen.quality import Json
from hsgen.spec import load

SPEED, LATER, PEERS, BACKWARD = (
    "speed_ten_",
    "speed_others_",
    "peers_",
    "backward_",
)  # how files begin
SYSTEMS = ("nsa", "moba", "flash_moba", "infllm_v2", "minimax_m3", "quest", "hisa", "dsa_gqa")
OTHERS = (
    "seer_attention_r",
    "seer_attention",
    "xattention",
    "psa",
    "psa_mass",
    "hip",
    "hirouter",
)
BESIDE_AUTHORS = ("nsa_xunhao", "nsa_fla")  # their kernels run at heads of 128, without a window
PLACE = re.compile(r"(<!-- speed:begin -->\n).*?(<!-- speed:end -->\n)", re.DOTALL)

TEXT = """One {card}, {date}, forward, bf16, one causal sequence of real heads repeated to length,
milliseconds of whole calls, choosing included; each output was held against the reference before it was
timed.  In brackets: the fastest other over ours, somebody else's kernel of the same system in the same run,
or the best dense attention of these heads that ran on such a card that day.  – is what was not measured.
More of it: [docs/speed.md](docs/speed.md), [docs/peers.md](docs/peers.md); parts of DSA and HISA beside
TileLang's kernels: [docs/tilelang_peers.md](docs/tilelang_peers.md); what authors claim:
[docs/headline.md](docs/headline.md).

"""

Heads = tuple[object, ...]


class Cell(NamedTuple):
    """One system at one length: ours, and all others by name."""

    ours: float
    others: Mapping[str, float]

    def __str__(self) -> str:
        name, best = min(self.others.items(), key=lambda each: each[1], default=("", 0.0))
        beside = f"{best / self.ours:.2f}× {name}" if name else common.MISSING
        return f"{common.number(self.ours)} ({beside})"


def table(results: Mapping[str, Json]) -> str:
    """The table with what stands above it, of the newest such run.  results: by the names of their files"""
    speed = max((x for file, x in results.items() if file.startswith(SPEED)), key=_made)
    made, card = _made(speed)
    same = {file: x for file, x in results.items() if _made(x) == (made, card)}
    dense = _dense(x for file, x in same.items() if not file.startswith(BACKWARD))
    peers = [result for file, result in same.items() if file.startswith(PEERS)]
    later = [result for file, result in same.items() if file.startswith(LATER)]
    lengths: dict[int, None] = {}
    rows: list[tuple[str, str, dict[int, Cell]]] = []
    for system in (*SYSTEMS, *OTHERS, *BESIDE_AUTHORS):
        cases = [
            case
            for result in (peers if system in BESIDE_AUTHORS else [speed, *later])
            for case in result["cases"].values()
            if (case["system"], case["inputs"]) == (system, "real")
        ]
        cells = {case["tokens"]: cell for case in cases if (cell := _cell(case, dense))}
        if cells:
            (query, kv), dims = _heads(cases[0])
            rows.append(
                (system, f"{query}/{kv} of {'/'.join(map(str, dict.fromkeys(dims)))}", cells)
            )
            lengths |= dict.fromkeys(cells)
    ordered = sorted(lengths)
    head = ["system", "source", "heads", *(f"{tokens:,}" for tokens in ordered)]
    lines = [
        [system, load(system).source or common.MISSING, heads]
        + [str(cells[tokens]) if tokens in cells else common.MISSING for tokens in ordered]
        for system, heads, cells in rows
    ]
    text = TEXT.format(card=card.removeprefix("NVIDIA "), date=made)
    return text + common.table(head, lines).replace("---:", "---")


def written(readme: str, results: Mapping[str, Json]) -> str:
    """The README with the table in its place."""
    return PLACE.sub(lambda found: found[1] + table(results) + found[2], readme)


def _made(result: Json) -> tuple[str, str]:
    first = result["runs"][0] if "runs" in result else result
    return first.get("date", ""), first.get("card", "")


def _heads(case: Json) -> tuple[tuple[int, int], tuple[int, ...]]:
    dims = case["head_dim"]
    query, kv = case["heads"]
    return (query, kv), tuple(dims) if isinstance(dims, list) else (dims, dims)


def _dense(results: Iterable[Json]) -> dict[Heads, dict[str, float]]:
    """By heads, head dims and tokens, the fastest dense attention of each backend."""
    found: dict[Heads, dict[str, float]] = {}
    for result in results:
        cases = result.get("cases", ())
        for case in cases.values() if isinstance(cases, dict) else cases:
            whole = {**result, **case}
            if not {"heads", "head_dim", "tokens", "steps"} <= whole.keys():
                continue
            known = found.setdefault((*_heads(whole), whole["tokens"]), {})
            for step, entry in whole["steps"].items():
                name = step.removeprefix("dense ").partition(",")[0]
                if step.startswith("dense ") and entry["status"] == "ok":
                    known[name] = min(entry["ms"]["median"], known.get(name, math.inf))
    return found


def _cell(case: Json, dense: Mapping[Heads, Mapping[str, float]]) -> Cell | None:
    """Of a case of either kind: in one ours is `total`, in the other `hsgen whole`."""
    times = (speed_report.milliseconds(case, step) for step in ("total", "hsgen whole"))
    ours = next(filter(None, times), None)
    if ours is None:
        return None
    others = dict(dense.get((*_heads(case), case["tokens"]), {}))
    for name, peer in peer_kernels.PEERS.items():
        if ms := speed_report.milliseconds(case, f"{name} whole"):
            others[peer.title] = ms
    return Cell(ours, others)
