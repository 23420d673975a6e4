"""Tokens that lie in pages: a sequence has a row of a table, which says where each of its pages is."""

import triton
import triton.language as tl


@triton.jit
def page_row(table, n, inside, PAGE: tl.constexpr, page_rows):
    """Rows of tokens in the tensor of all pages; `page_rows`: from one page to the next.  n, inside: [N] -> i64[N]"""
    page = tl.load(table + n // PAGE, mask=inside, other=0)
    return page.to(tl.int64) * page_rows + n % PAGE
