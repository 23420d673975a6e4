"""Bugs to plant in emitted kernels: each is one textual edit, and one small case that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old` occurs exactly once in `module` of the small `spec`, and becomes `new`."""

    name: str
    spec: str
    module: str
    old: str
    new: str
    case: str

    def apply(self, sources: dict[str, str]) -> dict[str, str]:
        """The sources with this bug; LookupError where the text has changed since."""
        text = sources[f"{self.module}.py"]
        if text.count(self.old) != 1:
            message = (
                f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.module}"
            )
            raise LookupError(message)
        return sources | {f"{self.module}.py": text.replace(self.old, self.new)}


def _attend(name: str, spec: str, module: str, old: str, new: str, case: str = "given") -> Mutant:
    return Mutant(name=name, spec=spec, module=module, old=old, new=new, case=case)


def _choose(name: str, spec: str, module: str, old: str, new: str, case: str = "choose") -> Mutant:
    return Mutant(name=name, spec=spec, module=module, old=old, new=new, case=case)


SEEN = "seen = tl.minimum(position + 1, k_len)"
TIES = """\
    slot = above_through + tl.minimum(ties_through, ties[:, None]) - 1
    taken = (above + tie * (ties_through <= ties[:, None]).to(tl.int32)) > 0
"""
LATER_TIES = """\
    skipped = tl.max(ties_through, 1)[:, None] - ties[:, None]
    slot = above_through + tl.maximum(ties_through - skipped, 0) - 1
    taken = (above + tie * (ties_through > skipped).to(tl.int32)) > 0
"""

MUTANTS = (
    # what is visible
    _attend("causal off by one", "nsa", "attend_selected", SEEN, SEEN.replace("+ 1", "+ 0")),
    _attend("one key leaks", "moba", "attend_selected", SEEN, SEEN.replace("+ 1", "+ 2")),
    _attend(
        "incomplete entry attended",
        "nsa",
        "attend_compressed",
        "tl.maximum(p + 1 + STRIDE - SIZE, 0)",
        "tl.maximum(p + 2 + STRIDE - SIZE, 0)",
    ),
    _choose(
        "complete entry not a candidate",
        "hisa",
        "rank_token",
        "tl.maximum(p + 1 + STRIDE - SIZE, 0)",
        "tl.maximum(p + STRIDE - SIZE, 0)",
    ),
    _attend(
        "window one key wider",
        "nsa",
        "attend_window",
        "n[None, :] > position[:, None] - 21",
        "n[None, :] > position[:, None] - 22",
    ),
    _attend(
        "q_offset ignored",
        "moba",
        "attend_selected",
        "position = q_offset + token",
        "position = token",
    ),
    _attend(
        "partial entry called full", "moba", "index_selected", " & (entry < seen)", "", "own_block"
    ),
    _attend(
        "tail not masked",
        "nsa",
        "attend_window",
        "        inside = n < stop\n",
        "        inside = n < stop + BLOCK_N\n",
    ),
    # who chose what
    _attend(
        "member bit shifted",
        "nsa",
        "index_selected",
        "(row % 32).to(tl.uint32)",
        "((row + 1) % 32).to(tl.uint32)",
    ),
    _attend(
        "duplicate counted twice",
        "moba",
        "index_selected",
        "counts = valid & ((place == 0) | (before != pair))",
        "counts = valid",
    ),
    _attend(
        "index of -1 used as address",
        "hisa",
        "gather_selected",
        "inside = (n >= 0) & ",
        "inside = ",
    ),
    _attend(
        "marks of the token before",
        "hisa",
        "attend_selected",
        "word[:, None] >> column",
        "word[:, None] >> (column + 1)",
        "union",
    ),
    _attend(
        "marks of half a word", "hisa", "index_selected", "<< (n % 64)", "<< (n % 32)", "union"
    ),
    _attend(
        "a block of the union lost",
        "hisa",
        "index_selected",
        "tl.cumsum(some, 0) - 1",
        "tl.maximum(tl.cumsum(some, 0) - 2, 0)",
        "union",
    ),
    _attend(
        "a row of the next block's list",
        "moba_keys",
        "attend_selected",
        "(place < tl.load(ENDS",
        "(place <= tl.load(ENDS",
    ),
    _attend(
        "one key leaks to a list", "moba_keys", "attend_selected", "position + 1", "position + 2"
    ),
    _attend(
        "rows of a block placed on each other",
        "moba_keys",
        "place_selected",
        "run_end(ends), 0) + place - start",
        "run_end(ends), 0)",
    ),
    _attend(
        "a part that is none counts",
        "moba_keys",
        "place_selected",
        "inside & (valid == 0)",
        "inside & (valid == 2)",
    ),
    _attend(
        "parts not weighed",
        "moba_keys",
        "merge_selected",
        "(tl.exp(lse - m_safe) * total)[:, None]",
        "total[:, None]",
    ),
    _attend(
        "block of another document",
        "moba_keys",
        "attend_selected",
        "length, STRIDE) <= bucket",
        "length, STRIDE) < bucket",
        "documents",
    ),
    _attend(
        "tiles of a block overlap",
        "moba_keys",
        "offsets_selected",
        "end - rows + part * BLOCK_T",
        "end - rows",
        "documents",
    ),
    _choose("tie rule reversed", "moba", "rank_chunk", TIES, LATER_TIES, "plateau"),
    _choose(
        "tie rule reversed where chunks are walked",
        "hisa",
        "rank_token",
        TIES,
        LATER_TIES,
        "plateau",
    ),
    _choose("forced entry dropped", "nsa", "rank_block", "(e < FIRST) | ", "(e < FIRST - 1) | "),
    _choose(
        "NaN first",
        "moba",
        "rank_chunk",
        "return tl.where(magnitude > 0x7F800000, -0x7FFFFFFF, key)",
        "return key",
        "nan",
    ),
    _choose(
        "subnormals ordered",
        "moba",
        "rank_chunk",
        "tl.where(magnitude < 0x00800000, 0, key)",
        "key",
        "subnormal",
    ),
    _choose(
        "sign of the order lost",
        "moba",
        "rank_chunk",
        "tl.where(bits < 0, -magnitude, magnitude)",
        "magnitude",
    ),
    _choose("relu missing", "hisa", "score_token", "tl.maximum(s, 0.0)", "s"),
    _choose(
        "wrong map weight",
        "nsa",
        "score_block",
        "fall = TARGET - offset",
        "fall = TARGET + 1 - offset",
    ),
    _choose(
        "pool divides by the nominal size",
        "moba_full",
        "pool_chunk_keys",
        "tl.maximum(tokens, 1).to(tl.float32)[:, None]",
        "16.0",
    ),
    _attend(
        "mate turned the same way",
        "pools",
        "pool_entry_keys",
        "tl.where(early[None, :], -other, other)",
        "other",
    ),
    _attend(
        "mate not normed",
        "pools",
        "pool_entry_keys",
        "other = normed(other, size, NORM, mate)",
        "pass",
    ),
    _attend(
        "weights of earlier tokens not rescaled",
        "pools",
        "pool_entry_keys",
        "total * rescale + tl.sum(weight, 1)",
        "total + tl.sum(weight, 1)",
    ),
    _attend(
        "turned by the number of the entry",
        "pools",
        "pool_entry_keys",
        "place = (k_first + e * 8)",
        "place = (k_first + e)",
    ),
    _choose(
        "padding not written",
        "moba",
        "rank_chunk",
        "slot >= total[:, None]",
        "slot > total[:, None]",
        "early",
    ),
    # numbers
    _attend(
        "accumulator not rescaled", "nsa", "attend_window", "acc0 = acc0 * rescale[:, None]", "pass"
    ),
    _attend(
        "sum not rescaled", "nsa", "attend_window", "l * rescale + tl.sum(p, 1)", "l + tl.sum(p, 1)"
    ),
    _attend(
        "scale applied twice",
        "nsa",
        "attend_window",
        "= softmax_step(s, m, l, ",
        "= softmax_step(s, m, l, 0.144 * ",
    ),
    _attend(
        "silent TF32",
        "nsa",
        "attend_window",
        's = tl.dot(q1, tl.trans(k1), s, input_precision="tf32x3")',
        's = tl.dot(q1, tl.trans(k1), s, input_precision="tf32")',
    ),
    _attend(
        "empty row is NaN",
        "moba",
        "attend_selected",
        'tl.where(m_new == float("-inf"), 0.0, m_new)',
        "m_new",
    ),
    _attend("log-sum-exp in base 2", "hisa", "gather_selected", " * 0.6931471805599453", ""),
    _attend("gate of another branch", "nsa", "attend_window", "g_b + 2 * g_c", "g_b + 1 * g_c"),
    _attend(
        "gate of another head", "nsa", "attend_selected", "g_t, row_head, g_h", "g_t, head, g_h"
    ),
    _attend("branches before left out", "nsa", "attend_window", "before.to(tl.float32) + x", "x"),
    _attend(
        "sum begins with what memory held",
        "nsa",
        "attend_compressed",
        "x.to(base.dtype.element_ty)",
        "(x + tl.load(base + row[:, None] + columns[None, :], mask=mask[:, None], other=0.0))",
    ),
    _attend("union without turns before", "union", "attend_window", "(before)", "(before - 1e9)"),
    _attend("turns before count twice", "union", "attend_window", "0.0, 1.0)", "0.0, 2.0)"),
    _attend(
        "turns before in another base",
        "union",
        "attend_window",
        "return lse * 1.4426950408889634",
        "return lse",
    ),
    _attend(
        "sink counted in another base",
        "logits",
        "attend_window",
        "sink * 1.4426950408889634",
        "sink",
    ),
    _attend(
        "sink of the group's first head",
        "logits",
        "attend_window",
        "tl.load(SINK + row_head, ",
        "tl.load(SINK + head * 2 + 0 * rows, ",
    ),
    _attend(
        "cap before the scale", "logits", "attend_window", "x = s * (SCALE / CAP)", "x = s / CAP"
    ),
    _attend("sink counted twice", "logits_keys", "merge_selected", "l + part", "l + part * 2.0"),
    # addresses
    _attend(
        "latent read from its second half", "sparse_mla", "attend_selected", "(p0, k0,", "(p0, k1,"
    ),
    _attend(
        "every program has the first heads",
        "sparse_mla",
        "attend_selected",
        "tl.program_id(0) % parts * BLOCK_H",
        "tl.program_id(0) % 1 * BLOCK_H",
    ),
    _attend(
        "heads stored that are none",
        "sparse_mla",
        "attend_selected",
        "(place < 65)",
        "(place < 70)",
    ),
    _attend(
        "list of another token",
        "sparse_mla",
        "attend_selected",
        "program = tl.program_id(0) // parts",
        "program = tl.program_id(0) // parts // 2 * 2",
    ),
    _attend(
        "wrong head of the group",
        "nsa",
        "attend_window",
        "row_head = head * 2 + rows % 2",
        "row_head = head + rows % 2 * 2",
    ),
    _attend("wrong stride", "nsa", "attend_selected", "tl.int64) * v_h", "tl.int64) * k_h"),
    _attend(
        "missing other",
        "nsa",
        "attend_window",
        "return tl.load(address, mask=mask[:, None], other=0.0)",
        "return tl.load(address, mask=mask[:, None])",
    ),
    _attend(
        "offset of a batch in int32",
        "moba",
        "attend_selected",
        "Q + z.to(tl.int64) * q_b",
        "Q + z * q_b",
        "far",
    ),
    _attend(
        "row of the next document stored",
        "moba",
        "attend_selected",
        "alive = (token < q_len) & ",
        "alive = (token <= q_len) & ",
        "documents",
    ),
    _attend(
        "two programs store one row",
        "nsa",
        "attend_window",
        "(tile - start) * BLOCK",
        "(tile - start) * (BLOCK - 1)",
    ),
    _attend(
        "last row of a tile not stored",
        "moba",
        "attend_selected",
        "alive = (token < q_len) & ",
        "alive = (token < q_len - 1) & ",
    ),
    _attend(
        "tiles of earlier documents miscounted",
        "moba",
        "attend_selected",
        "// BLOCK + low\n",
        "// BLOCK\n",
        "documents",
    ),
    # blocks of rows that choose together
    _choose(
        "entries that begin inside a block of rows are none",
        "dhsa_released",
        "rank_block",
        "last = block * ROWS + ROWS - 1",
        "last = block * ROWS",
    ),
    _choose(
        "own entries of a block's first row only",
        "dhsa_released",
        "rank_block",
        "(e <= last_own)",
        "(e <= first_own)",
    ),
    _choose(
        "blocks counted from the first row of a call",
        "dhsa_released",
        "spread_block",
        "block = block_at(q_offset + t, 32) - block_at(q_offset, 32)",
        "block = t // 32",
    ),
    _choose(
        "rows of a tile begin with their first token",
        "xattention",
        "score_block",
        "q_row = row + 1 - slot",
        "q_row = row + slot",
    ),
    _choose(
        "keys after a block of rows have mass",
        "xattention",
        "score_block",
        "entry[None, :] < limit[:, None]",
        "entry[None, :] <= limit[:, None]",
    ),
    _choose(
        "rows weighed by what none of them sees",
        "xattention",
        "sum_block",
        "x - whole[:, None]",
        "x",
    ),
    _choose(
        "the entry that reaches the mass left out",
        "xattention",
        "rank_block",
        "(wanted - above + each - 1) // each",
        "(wanted - above) // each",
    ),
    _attend(
        "list of the first block",
        "dhsa_released",
        "index_selected",
        "row = first_block(SEQ, z, 32) + block",
        "row = first_block(SEQ, z, 32)",
        "own",
    ),
    _attend(
        "partial entry of a block called full",
        "dhsa_released",
        "index_selected",
        "(entry < seen)",
        "(entry < limit)",
        "own",
    ),
    _attend(
        "rows before a call's first attended",
        "dhsa_released",
        "attend_selected",
        " & (token >= 0)",
        "",
        "own",
    ),
    _attend(
        "documents without rows attended",
        "dhsa_released",
        "attend_selected",
        "(tl.maximum(t0, 0) >= q_len)",
        "(t0 >= q_len)",
        "own",
    ),
    _attend(
        "every row a member of what some chose",
        "dhsa_released",
        "attend_selected",
        ">> bit & 1",
        ">> bit | 1",
    ),
    _attend(
        "entries that some rows chose called full",
        "dhsa_released",
        "members_selected",
        "whole = (tl.min((bits == everyone)",
        "whole = (tl.min((bits != 0)",
    ),
)
