import pytest
import torch

from hsgen import batch

CPU = torch.device("cpu")


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def test_dense_sequences_align_at_the_bottom_right():
    made = batch.dense(2, 3, 10, CPU)
    assert made.table.tolist() == [[0, 0, 3, 7, 0, 10], [3, 0, 3, 7, 0, 10]]
    assert (made.sequences, made.rows, made.keys, made.packed) == (2, 6, 10, False)
    assert made.table.dtype == torch.int32
    assert made.table.is_contiguous()


def test_more_queries_than_keys_start_before_position_0():
    assert batch.dense(1, 5, 2, CPU).table[0].tolist() == [0, 0, 5, -3, 0, 2]


@pytest.mark.parametrize(
    ("q_offset", "kv_lens", "offsets", "lengths"),
    [
        (4, None, [4, 4], [10, 10]),
        (None, 8, [5, 5], [8, 8]),
        (4, 8, [4, 4], [8, 8]),
        (i32(1, 2), None, [1, 2], [10, 10]),
        (None, i32(10, 3), [7, 0], [10, 3]),
        (i32(1, 2), i32(9, 8), [1, 2], [9, 8]),
        (6, i32(9, 8), [6, 6], [9, 8]),
        (torch.tensor(6, dtype=torch.int32), 9, [6, 6], [9, 9]),
        (None, torch.tensor(9, dtype=torch.int32), [6, 6], [9, 9]),
    ],
)
def test_offsets_and_lengths_are_numbers_or_tensors(q_offset, kv_lens, offsets, lengths):
    table = batch.dense(2, 3, 10, CPU, q_offset=q_offset, kv_lens=kv_lens).table
    assert table[:, batch.Q_OFFSET].tolist() == offsets
    assert table[:, batch.K_LEN].tolist() == lengths


def test_equal_sequences_share_one_cached_batch():
    assert batch.dense(2, 3, 10, CPU) is batch.dense(2, 3, 10, CPU)
    assert batch.dense(2, 3, 10, CPU) is not batch.dense(2, 3, 11, CPU)


def test_lengths_in_tensors_leave_the_cache_alone():
    batch.dense(2, 3, 10, CPU, kv_lens=i32(1, 2), q_offset=i32(5, 6))
    assert batch.dense(2, 3, 10, CPU).table.tolist() == [[0, 0, 3, 7, 0, 10], [3, 0, 3, 7, 0, 10]]


def test_the_cache_forgets_its_oldest(monkeypatch):
    monkeypatch.setattr(batch, "CACHED", 2)
    monkeypatch.setattr(batch, "_batches", {})
    first = batch.dense(1, 1, 1, CPU)
    batch.dense(1, 1, 2, CPU)
    batch.dense(1, 1, 3, CPU)
    assert len(batch._batches) == 2
    assert batch.dense(1, 1, 1, CPU) is not first


def test_packed_documents_keep_their_places():
    made = batch.packed(i32(0, 3, 3, 7), i32(0, 5, 6, 20), 7, 20)
    assert made.table.tolist() == [[0, 0, 3, 2, 0, 5], [3, 3, 0, 1, 5, 1], [3, 3, 4, 10, 6, 14]]
    assert (made.sequences, made.rows, made.keys, made.packed) == (3, 7, 20, True)
    assert made.table.dtype == torch.int32
    assert made.table.is_contiguous()


def test_packed_documents_take_offsets_lengths_and_a_maximum():
    made = batch.packed(
        i32(0, 3, 7), i32(0, 5, 20), 7, 20, max_seqlen_k=15, q_offset=i32(1, 2), kv_lens=4
    )
    assert made.table.tolist() == [[0, 0, 3, 1, 0, 4], [3, 3, 4, 2, 5, 4]]
    assert made.keys == 15


def test_no_sequence_makes_an_empty_table():
    assert batch.dense(0, 3, 10, CPU).table.shape == (0, 6)
    assert batch.packed(i32(0), i32(0), 0, 0).table.shape == (0, 6)


@pytest.mark.gpu
def test_tables_are_made_without_waiting_for_the_gpu():
    device = torch.device("cuda", 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lens = torch.zeros(3, dtype=torch.int32, device=device)
        batch.dense(3, 5, 977, device)
        batch.dense(3, 5, 977, device, kv_lens=lens)
        batch.packed(lens, lens, 0, 0, q_offset=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_streams_do_not_share_tables():
    device = torch.device("cuda", 0)
    first = batch.dense(3, 5, 979, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert batch.dense(3, 5, 979, device) is not first


@pytest.mark.gpu
def test_a_captured_table_is_made_at_every_replay():
    device = torch.device("cuda", 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = batch.dense(2, 3, 10, device).table
    graph.replay()
    assert table.tolist() == [[0, 0, 3, 7, 0, 10], [3, 0, 3, 7, 0, 10]]
    assert batch.dense(2, 3, 10, device).table is not table
