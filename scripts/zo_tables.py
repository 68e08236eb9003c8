"""Write the pages of the zeroth-order study from its records in results/zo_bench (benchmarks/zo_bench.py makes them).

`python scripts/zo_tables.py` writes docs/zo_bench.md, task_alignment.md, forward_grad.md and accuracy_against_memory.md,
`--check` compares them with the committed ones and ends with 1 if one differs. What stands between the two conclusion
marks of a page is written by hand and kept.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docs import table

ROOT = Path(__file__).parents[1]
DOCS, RECORDS = ROOT / "docs", ROOT / "results" / "zo_bench"

HEAD = "<!-- Written by scripts/zo_tables.py from results/zo_bench; only the conclusions are edited by hand. -->\n"
OPEN, CLOSE = "<!-- conclusions -->", "<!-- end of conclusions -->"
SCHEMES = ("full", "lora", "prefix", "prompt", "bitfit", "head")  # the order of columns
ERRORS = 2.0  # standard errors that a difference must exceed to be called one
BARE = "-bare"  # ends the name of a place whose task is not put in words
MIB = 2**20

Record = Mapping[str, Any]
Cells = dict[tuple[str, str, str, str], list[Record]]  # place, scheme, method, role -> records of its seeds


def read(folder: Path) -> Cells:
    """Every run of the study, by cell and role, in the order of seeds and rates."""
    cells: Cells = {}
    for path in sorted(folder.glob("*/*.json")):
        r = json.loads(path.read_text())
        cells.setdefault((r["place"], r["scheme"], r["method"], r["role"]), []).append(r)
    return {key: sorted(records, key=lambda r: (r["seed"], r["lr"])) for key, records in cells.items()}


# ---------------------------------------------------------------------------------------------------- what is said of a cell


def done(records: Iterable[Record]) -> list[Record]:
    """Those that came to an end."""
    return [r for r in records if r["status"] == "done"]


def scores(records: Sequence[Record], split: str = "test") -> list[float]:
    """The task's metric of each seed."""
    return [r[split][r["metric"]] for r in records]


def reference(zero_shot: Record | None, chance: float, majority: float | None) -> float:
    """What a method has to beat: the untrained model, a guess and the commonest label, whichever is best."""
    untrained = zero_shot["test"][zero_shot["metric"]] if zero_shot is not None else 0.0
    return max(untrained, chance, majority or 0.0)


def error(score: float, rows: int) -> float:
    """Standard error of a mean of `rows` scores in [0, 1]: exact for an accuracy, an upper bound for a mean F1."""
    return math.sqrt(max(score * (1 - score), 0.0) / rows)


def signal(records: Sequence[Record], zero_shot: Record | None) -> bool:
    """Whether a cell's mean over seeds exceeds its reference by more than two standard errors of the test rows."""
    first, mean = records[0], statistics.mean(scores(records))
    floor = reference(zero_shot, first["chance"], first["majority"])
    return mean > floor + ERRORS * error(mean, first["rows"]["test"])


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float]) -> str:
    """Mean and spread over seeds, in points."""
    deviation = spread(values)
    return f"{100 * statistics.mean(values):.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def loss(records: Sequence[Record]) -> float:
    """Mean dev loss over seeds, nats."""
    return statistics.mean(r["dev"]["loss"] for r in records)


def median(records: Sequence[Record], key: str) -> float:
    return statistics.median(r[key] for r in records)


def shown(records: Sequence[Record], zero_shot: Record | None, rank: int | None) -> str:
    """A cell of the main table; without a rank where it has no signal, or was not searched."""
    ended = done(records)
    if not ended:
        return records[0]["status"] if records else "-"
    text = f"{percent(scores(ended))} [{loss(ended):.3f}]"
    lost = f", {len(records) - len(ended)} {'/'.join(sorted({r['status'] for r in records} - {'done'}))}"
    text += lost if len(ended) < len(records) else ""
    heard = f"{text} ({rank})" if rank is not None else text
    return heard if signal(ended, zero_shot) else f"no signal: {text}"


def compared(first: Sequence[float], second: Sequence[float]) -> str:
    """`below`, `above` or `not told apart from`: the first's mean against the second's, by two standard errors over seeds."""
    if min(len(first), len(second)) < 2:
        return "(one seed each) not told apart from"
    difference = statistics.mean(first) - statistics.mean(second)
    width = ERRORS * math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))
    return "not told apart from" if abs(difference) <= width else "below" if difference < 0 else "above"


# ---------------------------------------------------------------------------------------------------- pages


def places_of(cells: Cells) -> list[str]:
    return sorted({key[0] for key in cells})


def schemes_of(cells: Cells, place: str) -> list[str]:
    found = {key[1] for key in cells if key[0] == place}
    return sorted(found, key=lambda s: (SCHEMES.index(s) if s in SCHEMES else len(SCHEMES), s))


def methods_of(cells: Cells, place: str) -> list[str]:
    return sorted({key[2] for key in cells if key[0] == place and key[3] in ("search", "seed")})


def zero_shot(cells: Cells, place: str, scheme: str) -> Record | None:
    return next(iter(done(cells.get((place, scheme, "zero_shot", "zero_shot"), []))), None)


def ranks(cells: Cells, place: str, scheme: str) -> dict[str, int]:
    """Methods with a signal, 1 for the best; one that takes another's rate is not ranked."""
    means = {}
    for method in methods_of(cells, place):
        ended = done(cells.get((place, scheme, method, "seed"), []))
        searched = (place, scheme, method, "search") in cells
        if ended and searched and signal(ended, zero_shot(cells, place, scheme)):
            means[method] = statistics.mean(scores(ended))
    return {m: 1 + sum(other > mean for other in means.values()) for m, mean in means.items()}


def setting(cells: Cells, place: str) -> str:
    """One sentence: what a place is."""
    r = next(r for key, records in sorted(cells.items()) if key[0] == place for r in done(records))
    majority = "" if r["majority"] is None else f", commonest label {100 * r['majority']:.1f}"
    rows = r["rows"]
    return (
        f"{r['model'].rpartition('/')[2].rpartition(':')[2]}, {r['task']}: {rows['train']} training, {rows['validation']} dev "
        f"and {rows['test']} test rows; {r['metric']} in points, chance {100 * r['chance']:.0f}{majority}; "
        f"{r['budget']:.0f} example-forwards a run, batch {r['batch']}.\n"
    )


def results(cells: Cells, place: str) -> str:
    """Methods by schemes."""
    schemes = schemes_of(cells, place)
    ranked = {scheme: ranks(cells, place, scheme) for scheme in schemes}
    untrained = []
    for scheme in schemes:
        z = zero_shot(cells, place, scheme)
        untrained.append("-" if z is None else f"{percent(scores([z]))} [{loss([z]):.3f}]")
    rows = [["untrained", *untrained]]
    for method in methods_of(cells, place):
        line = []
        for scheme in schemes:
            trials = cells.get((place, scheme, method, "search"), [])
            records = cells.get((place, scheme, method, "seed"), [] if done(trials) else trials)
            line.append(shown(records, zero_shot(cells, place, scheme), ranked[scheme].get(method)))
        rows.append([method, *line])
    return table(("method", *schemes), rows)


def costs(cells: Cells, place: str) -> str:
    """What each cell used."""
    rows = []
    for scheme in schemes_of(cells, place):
        for method in methods_of(cells, place):
            ended = done(cells.get((place, scheme, method, "seed"), []))
            if not ended:
                continue
            r, rates = ended[0], [t["lr"] for t in cells.get((place, scheme, method, "search"), [])]
            edge = "*" if r["lr"] in rates[:1] + rates[-1:] else ""
            counts = (f"{median(ended, key):.0f}" for key in ("forwards", "backwards"))
            memory = (f"{median(ended, key) / MIB:.1f}" for key in ("peak_bytes", "state_bytes"))
            used = (f"{r['cost']:g}", str(r["steps_made"]), *counts, f"{median(ended, 'cpu_seconds'):.1f}", *memory)
            rows.append((scheme, method, f"{r['lr']:g}{edge}", *used))
    head = ("scheme", "method", "rate", "cost a step", "steps", "forwards", "backwards", "s", "peak MiB", "state MiB")
    return table(head, rows)


def study(cells: Cells, folder: Path) -> str:
    """docs/zo_bench.md."""
    seeds = sorted({r["seed"] for key, records in cells.items() if key[3] == "seed" for r in records})
    text = f"""# Every method at equal forwards

Test metric, mean ± standard deviation over seeds {", ".join(map(str, seeds))}, mean dev loss in brackets, rank in
parentheses. *No signal*: the mean does not exceed the untrained model, chance and the commonest label, whichever is best,
by two standard errors of the test rows; such a cell is not ranked. `benchmarks/zo_bench.py` describes the protocol and the
records, `benchmarks/zo_bench.yaml` the grid with the cost of a step; every method has the same budget of example-forwards
and the same search of its rate. adamw_checkpointed computes what adamw computes, and is run once for its memory and time.
"""
    for place in places_of(cells):
        text += f"\n## {place}\n\n{setting(cells, place)}\n{results(cells, place)}"
        text += f"\nMedians over seeds; * the rate is at the edge of those tried.\n\n{costs(cells, place)}"
    memory = folder / "memory.json"
    return text + (f"\n## Peak memory against length\n\n{lengths(json.loads(memory.read_text()))}" if memory.exists() else "")


def lengths(record: Record) -> str:
    """The figures of benchmarks/zo_memory.py, named SIDE_LENGTH_mib: methods by lengths, MiB."""
    found: dict[str, dict[int, float]] = {}
    for key, value in record["figures"].items():
        name, _, length = key.removesuffix("_mib").rpartition("_")
        if length.isdigit():
            found.setdefault(name, {})[int(length)] = value
    columns = sorted({length for values in found.values() for length in values})
    rows = [(name, *(f"{values[n]:.1f}" if n in values else "-" for n in columns)) for name, values in found.items()]
    settings = ", ".join(f"{k} {v}" for k, v in record.get("setting", {}).items())
    return table(("", *map(str, columns)), rows) + f"\nSetting: {settings}.\n"


def alignment(cells: Cells) -> str:
    """docs/task_alignment.md."""
    text = """# Task alignment: with and without the prompt

The same rows, label words and budget; once with the task put in words, once the sentence alone. Gain: points over the
untrained model on the test rows.
"""
    for bare in (p for p in places_of(cells) if p.endswith(BARE)):
        place, rows, said = bare.removesuffix(BARE), [], []
        for scheme in schemes_of(cells, bare):
            for method in methods_of(cells, bare):
                sides = [(done(cells.get((p, scheme, method, "seed"), [])), zero_shot(cells, p, scheme)) for p in (place, bare)]
                if not all(records and untrained for records, untrained in sides):
                    continue
                line, gains = [scheme, method], []
                for records, untrained in sides:
                    assert untrained is not None
                    gains.append([s - scores([untrained])[0] for s in scores(records)])
                    name = "signal" if signal(records, untrained) else "no signal"
                    line += [percent(scores([untrained])), f"{percent(scores(records))} [{loss(records):.3f}]", name]
                    line.append(percent(gains[-1]))
                rows.append(line)
                verdict = compared(gains[1], gains[0])
                said.append(
                    f"- {method}, {scheme}: the gain without the prompt is {verdict} that with it.".replace(
                        "apart that", "apart from that"
                    )
                )
        columns = [f"{c}, {kind}" for kind in ("prompt", "bare") for c in ("untrained", "tuned [dev loss]", "signal", "gain")]
        text += (
            f"\n## {place}\n\n{setting(cells, bare)}\n{table(('scheme', 'method', *columns), rows)}\n" + "\n".join(said) + "\n"
        )
    return text


def forward(cells: Cells) -> str:
    """docs/forward_grad.md."""
    text = """# Forward gradient against ZO-SGD

A Jacobian-vector product counts two forwards, as the two probes of zo_sgd. *Equal time*: as many steps as fit into the
seconds of zo_sgd; *equal memory*: the batch at which its peak over the weights is that of zo_sgd, with the budget kept.
Both at the rate found for equal forwards.
"""
    for place in places_of(cells):
        for scheme in schemes_of(cells, place):
            rows, said = [], []
            base = done(cells.get((place, scheme, "zo_sgd", "seed"), []))
            for method, role in (("zo_sgd", "seed"), *(("forward_grad", r) for r in ("seed", "equal_time", "equal_memory"))):
                records = done(cells.get((place, scheme, method, role), []))
                if not records or not base or ("forward_grad" not in methods_of(cells, place)):
                    continue
                name = f"{method}, {'equal forwards' if role == 'seed' else role.replace('_', ' ')}"
                used = (str(records[0]["batch"]), str(records[0]["steps_made"]), f"{median(records, 'cpu_seconds'):.1f}")
                score = (f"{percent(scores(records))}", f"{loss(records):.4f}")
                rows.append((name, *used, f"{median(records, 'peak_bytes') / MIB:.1f}", *score))
                if method != "zo_sgd":
                    verdict = compared([r["dev"]["loss"] for r in records], [r["dev"]["loss"] for r in base])
                    said.append(f"- {name.partition(', ')[2]}: its dev loss is {verdict} that of zo_sgd.")
            if len(rows) > 1:
                head = ("method", "batch", "steps", "s", "peak MiB", "test", "dev loss")
                text += f"\n## {place}, {scheme}\n\n{table(head, rows)}\n" + "\n".join(said) + "\n"
    return text


def memory(cells: Cells) -> str:
    """docs/accuracy_against_memory.md."""
    text = """# Accuracy against state bytes and forwards

State: what the method declares to hold beside the weights. Front: no other cell of the place is at least as good with as
little state, and better in one of the two; cells without signal are no part of it.
"""
    for place in places_of(cells):
        points = []
        for scheme in schemes_of(cells, place):
            for method in methods_of(cells, place):
                ended = done(cells.get((place, scheme, method, "seed"), []))
                if ended:
                    heard = signal(ended, zero_shot(cells, place, scheme))
                    points.append((median(ended, "state_bytes"), statistics.mean(scores(ended)), scheme, method, heard, ended))
        points.sort(key=lambda p: (p[0], -p[1], p[2], p[3]))
        rows = []
        for state, score, scheme, method, heard, ended in points:
            beaten = any(h and s <= state and v >= score and (s, v) != (state, score) for s, v, _, _, h, _ in points)
            spent = f"{ended[0]['cost'] * ended[0]['steps_made'] * ended[0]['batch']:.0f}"
            kind = "no signal" if not heard else "" if beaten else "front"
            tuned = f"{ended[0]['tuned_weights']:,}"
            peak = f"{median(ended, 'peak_bytes') / MIB:.1f}"
            rows.append((method, scheme, tuned, f"{state / MIB:.2f}", peak, spent, percent(scores(ended)), kind))
        head = ("method", "scheme", "tuned weights", "state MiB", "peak MiB", "example-forwards", "test", "")
        text += f"\n## {place}\n\n{setting(cells, place)}\n{table(head, rows)}"
    return text


# ---------------------------------------------------------------------------------------------------- files


def with_conclusions(text: str, old: str, head: str = HEAD) -> str:
    """A page with what was written by hand into the old one, below its title; head: says who wrote it."""
    _, begun, rest = old.partition(OPEN)
    own, ended, _ = rest.partition(CLOSE)
    title, _, body = text.partition("\n\n")
    return f"{head}\n{title}\n\n{OPEN}{own if begun and ended else chr(10)}{CLOSE}\n\n{body}"


def pages(folder: Path) -> dict[str, str]:
    """Name -> text of every page that the records can fill."""
    cells = read(folder)
    if not cells:
        return {}
    makers: dict[str, Callable[[], str]] = {
        "zo_bench.md": lambda: study(cells, folder),
        "task_alignment.md": lambda: alignment(cells),
        "forward_grad.md": lambda: forward(cells),
        "accuracy_against_memory.md": lambda: memory(cells),
    }
    return {name: make() for name, make in makers.items()}


def publish(texts: Mapping[str, str], docs: Path, check: bool, head: str = HEAD) -> int:
    """Write pages with their conclusions kept, or with `check` compare them; 1 if one differs, else 0."""
    code = 0
    for name, text in texts.items():
        path = docs / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = with_conclusions(text, old, head)
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, "generated", lineterm="", n=1)
            print(f"docs/{name} is not what the records say; `make docs` writes it again", *lines, sep="\n", file=sys.stderr)
            code = 1
    return code


def arguments(doc: str | None, records: Path, given: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a script that writes pages."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; show how the committed pages differ")
    parser.add_argument("--records", type=Path, default=records)
    parser.add_argument("--docs", type=Path, default=DOCS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """0 if the pages are written or current, 1 if `--check` finds a difference."""
    args = arguments(__doc__, RECORDS, given)
    return publish(pages(args.records), args.docs, args.check)


if __name__ == "__main__":
    sys.exit(main())
