"""The page: one self-contained file with what the records say."""

from __future__ import annotations

import re

from smidgen.report import page


def record(method, accuracy):
    return {
        "method": method,
        "scheme": "full",
        "metric": "accuracy",
        "before": {"loss": 0.7, "accuracy": 0.5},
        "dev": {"loss": 0.4, "accuracy": accuracy},
        "peak_bytes": 50 * 2**20,
        "forwards": 1234,
        "backwards": 0,
        "seconds": 3.25,
        "steps": 10,
        "tuned_weights": 10,
        "weights": 40,
        "versions": {"smidgen": "0.1.0"},
        "curve": [{"step": 5, "eval_loss": 0.6}, {"step": 10, "eval_loss": 0.4}],
    }


def test_page_is_self_contained_and_shows_every_figure():
    text = page("a <title>", [record("adamw", 0.93), record("zo_sgd", 0.611)])
    for shown in ("a &lt;title&gt;", "adamw (full)", "93.0 %", "61.1 %", "50 MiB", "1,234", "3.2 s", "25.0 %", "<svg"):
        assert shown in text, shown
    links = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', text))
    assert not links and "<script" not in text
    assert text == page("a <title>", [record("adamw", 0.93), record("zo_sgd", 0.611)])
