"""Splits: held-out rows, nested choices and mixtures, all by hash."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.splits import mix, split_rows, take
from texts import rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60))
def test_held_out_rows_never_train(texts):
    found = rows(*({"text": text} for text in texts))
    train, held = split_rows(found)
    assert len(train) + len(held) == len(found) and train
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert bool(held) == (len(set(texts)) > 1) or held == []


def test_share_and_cap_of_held_out_rows():
    assert [len(part) for part in split_rows(rows(*({"text": str(i)} for i in range(200))))] == [180, 20]
    assert len(split_rows(rows(*({"text": str(i)} for i in range(6000))))[1]) == 500
    assert len(split_rows(rows({"text": "a"}, {"text": "b"}))[1]) == 1


def test_held_out_rows_do_not_depend_on_order():
    found = rows(*({"text": str(i)} for i in range(100)))
    shuffled = random.Random(0).sample(found, 100)
    assert sorted(row["text"] for row in split_rows(found)[1]) == sorted(row["text"] for row in split_rows(shuffled)[1])


def test_take_is_nested_and_keeps_order():
    items = [{"text": str(i)} for i in range(50)]
    ten, twenty = take(items, 10), take(items, 20)
    assert all(item in twenty for item in ten) and ten == [item for item in items if item in ten] and ten != items[:10]
    assert take(items, 50) == take(items, None) == items


def test_mix_shows_rows_by_weight_and_interleaves():
    a, b = rows(*({"text": f"a{i}"} for i in range(40))), rows(*({"text": f"b{i}"} for i in range(20)))
    mixed = mix([a, b], [1, 2.5], seed=0)
    counts = {row["text"]: sum(other["text"] == row["text"] for other in mixed) for row in mixed}
    assert all(counts[f"a{i}"] == 1 for i in range(40))
    assert sorted(counts[f"b{i}"] for i in range(20)) == [2] * 10 + [3] * 10
    firsts = [row["text"][0] for row in mixed[:45]]
    assert 15 <= firsts.count("a") <= 25
    assert mix([a, b], [1, 2.5], seed=0) == mixed != mix([a, b], [1, 2.5], seed=1)
    assert mix([a], [1], seed=3) == a
    assert len(mix([a, b], [1, 0.001], seed=0)) == 41  # never none of a source
