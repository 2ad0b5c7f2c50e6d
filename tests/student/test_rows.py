"""Rows hold every sequence once and cost no more than they must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slmreason.student.rows import longest_row, pack_rows, row_cost


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.sampled_from([64, 896, 4096]))
def test_pack_rows_keeps_each_sequence_once_and_costs_no_more_than_the_plain_ways(lengths: list[int], h: int) -> None:
    rows = pack_rows(lengths, h)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    cost = row_cost(len(rows), longest_row(rows, lengths), h)
    assert cost <= row_cost(len(lengths), max(lengths), h)  # each alone, padded
    assert cost <= row_cost(1, sum(lengths), h)  # all in one row


def plain_pack_rows(lengths: list[int], hidden_size: int, device_type: str) -> list[list[int]]:
    """Every number of rows tried in turn; the first of the cheapest."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ways = []
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        sums = [0] * count
        for index in order:
            row = min(range(count), key=lambda row: (sums[row], row))
            rows[row].append(index)
            sums[row] += lengths[index]
        ways.append((row_cost(count, max(sums), hidden_size, device_type), count, rows))
    return min(ways)[2]


@given(
    st.lists(st.integers(1, 400) | st.sampled_from([3, 7]), min_size=1, max_size=40),
    st.sampled_from([16, 128, 896]),
    st.sampled_from(["cpu", "cuda"]),
)
def test_pack_rows_gives_what_trying_every_number_of_rows_gives(lengths: list[int], h: int, device_type: str) -> None:
    assert pack_rows(lengths, h, device_type) == plain_pack_rows(lengths, h, device_type)


def test_a_gpu_has_shorter_rows() -> None:
    lengths = [397, 350, 310, 300, 290, 260, 200, 176] * 4
    assert len(pack_rows(lengths, 896, "cuda")) > len(pack_rows(lengths, 896, "cpu"))
    assert row_cost(3, 100, 896, "cuda") - row_cost(3, 100, 896, "cpu") == 3 * 100 * 6 * 100


def test_wide_models_have_long_rows_with_little_padding() -> None:
    lengths = [397, 350, 310, 300, 290, 260, 200, 176]
    shape = lambda h: (len(rows := pack_rows(lengths, h)), longest_row(rows, lengths))  # noqa: E731
    assert shape(16)[0] == 7
    assert shape(896) == (4, 590)  # 3 % padding; each alone would have 28 %
