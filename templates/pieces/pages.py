"""Tokens that lie in pages: a sequence has a row of a table, which says where each of its pages is."""

import triton
import triton.language as tl


@triton.jit
def page_of(table, n, inside, PAGE: tl.constexpr):
    """The page of each token, 0 outside.  n, inside: [N] -> [N]"""
    return tl.load(table + n // PAGE, mask=inside, other=0)


@triton.jit
def page_row(table, n, inside, PAGE: tl.constexpr, page_rows, pool):
    """Rows of tokens in the tensor of all pages, of which there are `pool`.  n, inside: [N] -> i64[N]

    `page_rows`: from one page to the next.  Of a page that is none it is a row of another one.
    """
    page = tl.minimum(tl.maximum(page_of(table, n, inside, PAGE), 0), pool - 1)
    return page.to(tl.int64) * page_rows + n % PAGE
