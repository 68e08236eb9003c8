"""The search of a cell: which rates are tried, that each trial is asked for once, whatever is killed in between."""

from __future__ import annotations

import math

import pytest

from smidgen.search import Search, next_rate

SETTINGS = {"trials": 5, "spacing": 4.0, "sampler": "walk"}


def record(values, best):
    return {"status": "done", "metric": "loss", "dev": {"loss": abs(math.log(values["lr"] / best))}, "values": values}


def conducted(folder, best, settings=SETTINGS, more=None, *, forget=True):
    """All trials of a search whose loss grows with the distance from the best rate; a new `Search` before every look."""
    made: dict = {}
    search = Search(folder)
    for _ in range(20):
        search = Search(folder) if forget else search
        found = search.trials("cell", settings, 1e-3, more or {}, lambda number, values, made=made: made.get(number))
        waiting = [(n, values) for n, values in found if n not in made]
        if not waiting:
            return [values for _, values in found]
        made |= {n: record(values, best) for n, values in waiting[:1]}
    raise AssertionError("the search does not end")


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [0.001, 0.00025, 0.004, 0.016, 0.064]),
        (1e-9, [0.001, 0.00025, 0.004, 6.25e-05, 1.56e-05]),
        (1.5e-3, [0.001, 0.00025, 0.004, 0.002, 0.00141]),
    ],
)
def test_a_walk_goes_beyond_an_edge_and_grows_finer_between(tmp_path, best, tried):
    assert [v["lr"] for v in conducted(tmp_path, best)] == tried


def test_further_keys_are_searched_with_the_rate_and_alike_after_every_kill(tmp_path):
    more = {"method_args.eps": (1e-4, 1e-1)}
    found = conducted(tmp_path / "a", 1e-2, more=more)
    assert found == conducted(tmp_path / "b", 1e-2, more=more, forget=False)
    assert len(found) == 5 and all(1e-4 <= v["method_args.eps"] <= 1e-1 for v in found)
    assert [v["lr"] for v in found[:3]] == [0.001, 0.00025, 0.004]


def test_failed_trials_send_a_walk_down():
    failed = [{"status": "diverged", "metric": "loss", "dev": {}, "values": {"lr": lr}} for lr in (1.0, 4.0)]
    assert next_rate(failed, 4.0) == 0.25
