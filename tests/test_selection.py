import pytest
import torch

from hsgen.errors import ArgumentError
from hsgen.selection import (
    BitmapSelection,
    ListSelection,
    checked,
    checked_range,
    from_members,
    members,
    to_bitmap,
    to_list,
)


def listed(*rows: list[int], level: str = "block") -> ListSelection:
    """One batch of rows with one head."""
    indices = torch.tensor(rows, dtype=torch.int32)
    return ListSelection(level=level, indices=indices[None, :, None])


def test_members_ignore_what_is_no_entry():
    mask = members(listed([-1, 2, 2, 9, 0]), 4)
    assert mask[0, 0, 0].tolist() == [True, False, True, False]


def test_lists_come_back_ascending_and_padded():
    messy = listed([-1, 2, 2, 9, 0], [-1, -1, -1, -1, 3])
    assert to_list(messy, width=4).indices[0, :, 0].tolist() == [[0, 2, 9, -1], [3, -1, -1, -1]]
    assert to_list(messy).indices.shape[-1] == 3


def test_too_narrow_a_list_is_an_error():
    with pytest.raises(ArgumentError, match="expected at least 3 slots a row, got 2"):
        to_list(listed([1, 2, 3]), width=2)


@pytest.mark.parametrize("entries", [1, 31, 32, 33, 64, 100])
def test_bitmaps_hold_the_same_sets(entries):
    mask = torch.rand(2, 5, 3, entries, generator=torch.Generator().manual_seed(entries)) < 0.4
    mask[0, 0] = True
    chosen = from_members("block", mask)
    bitmap = to_bitmap(chosen, entries)
    assert bitmap.words.dtype == torch.int32
    assert bitmap.words.shape == (2, 5, 3, -(-entries // 32))
    assert torch.equal(members(bitmap, entries), mask)
    assert torch.equal(
        to_list(bitmap, width=entries).indices, to_list(chosen, width=entries).indices
    )


def test_bit_of_an_entry_is_where_the_docs_say():
    words = to_bitmap(listed([0, 33, 31]), 64).words
    assert words.flatten().tolist() == [1 - (1 << 31), 2]


def test_members_of_a_bitmap_fit_any_number_of_entries():
    bitmap = to_bitmap(listed([0, 33]), 40)
    assert members(bitmap, 20).shape[-1] == 20
    assert members(bitmap, 100)[0, 0, 0].nonzero().flatten().tolist() == [0, 33]


@pytest.mark.parametrize("shape", [(0, 3, 1, 2), (1, 0, 1, 2), (1, 3, 1, 0)])
def test_empty_selections_convert(shape):
    empty = ListSelection(level="block", indices=torch.zeros(shape, dtype=torch.int32) - 1)
    assert members(empty, 5).shape == (*shape[:-1], 5)
    assert to_list(to_bitmap(empty, 5)).indices.numel() == 0


def test_selections_print_their_sizes():
    assert (
        repr(listed([0, 2, -1], [1, -1, -1])) == "block: list i32[1, 2, 1, 3], 1..2 entries a row"
    )
    assert repr(to_bitmap(listed([0, 2]), 40)) == (
        "block: bitmap of 40, i32[1, 1, 1, 2], 2 entries a row"
    )


def test_good_selections_pass():
    chosen = listed([0, 2, -1])
    assert checked(chosen, level="block", rows=(1, 1), heads=1) is chosen
    assert checked_range(chosen, 3) is chosen


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (listed([0], level="token"), "expected level 'block', got 'token'"),
        (ListSelection(level="block", indices=torch.zeros(1, 1, 1, 2)), "expected torch.int32"),
        (listed([0], [0]), r"expected \[1, 1, 1, K\], got \[1, 2, 1, 1\]"),
        (BitmapSelection(level="block", words=torch.zeros(1, dtype=torch.int32), entries=40), "2"),
        (torch.zeros(1, 1, 1, 1), "got Tensor"),
    ],
)
def test_bad_selections_say_what_is_wrong(selection, message):
    with pytest.raises(ArgumentError, match=message):
        checked(selection, level="block", rows=(1, 1), heads=1)


def test_index_out_of_range_is_named():
    with pytest.raises(ArgumentError, match="expected indices below 4, got 9"):
        checked_range(listed([0, 9]), 4)
