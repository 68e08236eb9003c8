"""The page: one self-contained file with what the records say; its verdicts; its size and speed; how it looks in a browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest

from smidgen import report, summary
from smidgen.charts import Axis
from smidgen.config import ConfigError
from test_records import record


def several(values, method, **more):
    return [record(method, seed, value, **more) for seed, value in enumerate(values)]


UNTRAINED = record("untrained", value=0.55) | {"role": "untrained", "scheme": "-", "name": "m-t/untrained"}
FAILED = {**record("hybrid"), "status": "refused", "error": "no <layers>"}
SOME = [
    UNTRAINED,
    *several((0.9, 0.91, 0.92), "adamw", peak_bytes=200 << 20),
    *several((0.89, 0.91, 0.91), "adamw_checkpointed", peak_bytes=120 << 20),
    *several((0.70, 0.71, 0.72), "zo_sgd"),
    *several((0.55, 0.56, 0.54), "zo_sign"),
    FAILED,
]


def test_the_verdicts():
    (table,) = summary.tables(SOME)
    assert {line.method: line.verdict for line in table.lines} == {
        "adamw": "best",
        "adamw_checkpointed": "not told apart",
        "zo_sgd": "below the best",
        "zo_sign": "no signal",
    }
    assert table.floor == 0.55 and [line.method for line in table.failed] == ["hybrid"]
    front = summary.frontier(table.lines[:3], True)
    assert [line.method for line in front] == ["zo_sgd", "adamw_checkpointed", "adamw"]
    said = " ".join(summary.sentences(table))
    assert "adamw (full) is the best: 91.0 ± 1.0 %" in said and "Not told apart from it: adamw_checkpointed (full)" in said


def test_what_has_fewer_seeds_is_not_called_the_best():
    (table,) = summary.tables([UNTRAINED, *several((0.9, 0.91, 0.92), "adamw"), record("lucky", 0, 0.99)])
    assert table.lines[0].method == "adamw" and table.lines[1].verdict != "best"


def test_of_losses_the_lower_is_better():
    def lost(method, values):
        return [
            record(method, s, metric="loss", dev={"loss": v}, test={"loss": v}, interval=None) for s, v in enumerate(values)
        ]

    (table,) = summary.tables([*lost("adamw", (0.4, 0.401)), *lost("zo_sgd", (0.6, 0.601)), *lost("zo_sign", (0.70, 0.74))])
    assert [(line.method, line.verdict) for line in table.lines] == [
        ("adamw", "best"),
        ("zo_sgd", "below the best"),
        ("zo_sign", "no signal"),
    ]


class Reader(HTMLParser):
    """Tags that are open at the end, and the attributes of all."""

    VOID = ("meta", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_self_contained_well_formed_and_says_everything():
    text = report.page("a <title>", SOME)
    for shown in (
        "a &lt;title&gt;",
        "adamw (full)",
        "91.0 ± 1.0",
        "200 MiB",
        "no &lt;layers&gt;",
        "smidgen train x=1",
        "no signal",
    ):
        assert shown in text, shown
    links = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', text))
    assert not links and "<script" not in text and "http" not in text
    read = Reader(text)
    assert not read.open and not read.wrong
    marks = [a for tag, a in read.seen if tag == "g" and "tabindex" in a]
    assert len(marks) >= 3 * 4 and all(a["role"] == "img" and a["aria-label"] for a in marks)
    named = {a["id"] for _, a in read.seen if "id" in a}
    assert {a["href"][1:] for tag, a in read.seen if tag == "a"} <= named
    assert {a["aria-labelledby"] for _, a in read.seen if "aria-labelledby" in a} <= named
    assert text == report.page("a <title>", SOME)


def test_unequal_data_have_no_page():
    with pytest.raises(ConfigError, match="different test rows"):
        report.page("t", [record(), {**record("zo_sgd"), "data": {"train": record()["data"]["train"]}}])


def test_the_other_forms_say_the_same():
    text = report.as_markdown("t", SOME)
    assert "| adamw | full | 91.0 ± 1.0 | 3 | best | 200 MiB |" in text and "refused: no <layers>" in text
    rows = list(csv.DictReader(io.StringIO(report.as_csv(SOME))))
    assert len(rows) == len(SOME) and rows[-1]["error"] == "no <layers>" and rows[1]["value"] == "0.9"


def test_five_hundred_runs_make_a_small_page_soon():
    many = [record(f"method{k % 25}", k // 25, 0.6 + (k % 97) / 400, peak_bytes=(k + 9) << 20) for k in range(500)]
    began = time.perf_counter()
    text = report.page("many", many)
    assert time.perf_counter() - began < 5 and len(text.encode()) < 2_000_000


@pytest.mark.parametrize(("values", "log"), [([10.0, 1000.0], True), ([10.0, 20.0], False), ([5.0], False)])
def test_axes_have_ticks_inside(values, log):
    axis = Axis.over(values, 0, 100, positive=True)
    assert axis.log is log and 1 <= len(axis.ticks()) <= 8
    assert all(-1e-6 <= axis.at(t) <= 100 + 1e-6 for t in axis.ticks()) and all(0 <= axis.at(v) <= 100 for v in values)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_browser_shows_the_page(tmp_path, width, dark):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    say = "document.documentElement.scrollWidth + ' ' + getComputedStyle(document.body).backgroundColor"
    probe = f"<script>document.title = {say}</script>"
    (tmp_path / "p.html").write_text(report.page("t", SOME).replace("</body>", probe + "</body>"))
    options = [f"--window-size={width},900", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = subprocess.run([browser, *options, f"file://{tmp_path}/p.html"], capture_output=True, text=True, timeout=120).stdout
    shown, ground = re.search(r"<title>(\d+) (rgb.*?)</title>", dom).groups()
    assert int(shown) <= max(width, 500)  # nothing sticks out; headless windows are at least 500 wide
    assert (ground == "rgb(20, 24, 31)") is dark
