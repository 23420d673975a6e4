"""Codes: vectors as the numbers of the codewords that are nearest to them."""

from typing import Literal

from hsgen.spec.model.scalars import Count, Node


class Codes(Node):
    """Product quantisation: channels in runs of `dim`, each run the nearest of its `words` codewords.

    The input `<level>_codebook [Dqk / dim, words, dim]` has the codewords, those of all heads, and of
    queries and keys alike.  Ties go to the lower codeword.

    With `buckets` a score is no count of equal codes but the number of its bucket: as many counts as
    runs // buckets go into one, and all that are left into the last one.
    """

    words: Count  # codewords of one run
    dim: Count  # channels of one run
    distance: Literal["l1", "l2"] = "l2"
    buckets: Count | None = None  # left out: the count itself
