"""The pieces of a model that is larger than the disk."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ggufrq.make.pieces import SHARDS, cut

SHARD_BYTES = {"a": 100, "b": 80, "c": 100, "d": 20}


def tensor(name: str, size: int, *files: str) -> dict[str, object]:
    return {"name": name, "bytes": size, "files": list(files)}


def test_pieces_follow_the_shards() -> None:
    found = cut(
        [
            tensor("0", 30, "a"),
            tensor("1", 20, "a"),
            tensor("2", 30, "a", "b"),
            tensor("3", 20, "b"),
            tensor("4", 10, "c"),
            tensor("5", 5),
            tensor("6", 300, "b", "c", "d"),
        ],
        SHARD_BYTES,
    )
    assert [piece.names for piece in found.every] == [("0", "1"), ("2", "3"), ("4", "5"), ("6",)]
    assert [piece.files for piece in found.every] == [{"a"}, {"a", "b"}, {"c"}, {"b", "c", "d"}]
    # two shards of 100 bytes and the three that one tensor is made of take the same; the largest piece twice
    assert found.disk == 200 + 2 * 300


@given(st.lists(st.tuples(st.integers(1, 90), st.sets(st.sampled_from("abcd"), max_size=3)), max_size=30))
def test_every_tensor_once_in_order_and_within_bounds(tensors: list[tuple[int, set[str]]]) -> None:
    found = cut([tensor(str(i), size, *of) for i, (size, of) in enumerate(tensors)], SHARD_BYTES)
    assert [name for piece in found.every for name in piece.names] == [str(i) for i in range(len(tensors))]
    for piece in found.every:
        assert len(piece.names) == 1 or (piece.bytes <= 50 and len(piece.files) <= SHARDS)
