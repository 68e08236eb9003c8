"""`smidgen plan`: what fits, said before anything is loaded. Nothing heavy is imported before it runs."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any, Optional

import typer

Text = Optional[str]  # noqa: UP045 - typer reads this at run time

_HEADING = "bytes in GiB at the peak of a step; on top come what libraries keep (about 0.5 GiB on CUDA) and the data"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="hub name, folder, 'embedded', or a size: 7B, 13B, 70B")],
    data: Annotated[Text, typer.Option("--data", "-d", help="rows whose length decides --length; as for train")] = None,
    memory: Annotated[Text, typer.Option("--memory", help="memory to fit, such as 8GB; what is free here if left out")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", help="rows of a forward")] = 8,
    length: Annotated[Optional[int], typer.Option("--length", help="tokens of a row")] = None,  # noqa: UP045
    method: Annotated[Text, typer.Option("--method", help="plan this method alone")] = None,
    scheme: Annotated[Text, typer.Option("--scheme", help="plan this scheme alone")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[Text, typer.Option("--device", help="cpu or cuda; where a run would compute if left out")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="make two steps with random weights, for comparison")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what every way to tune a model would need, and recommend one. Reads no weights. Exits with 0 if something fits,
    else with 3."""
    import torch

    from smidgen import advice, models
    from smidgen.measure import measured
    from smidgen.planner import UNKNOWN, Planner

    size_alone = advice.is_spec(model)  # 7B stands for a model on a GPU, in the 16 bits in which such models are published
    place = device or ("cuda" if torch.cuda.is_available() or size_alone else "cpu")
    config = advice.configuration(model, trust_remote_code=trust_remote_code)
    labels, classes = None, None
    if data is not None:
        from smidgen.listing import describe_data

        found = describe_data(data, model=model, kind="auto", row=0, max_length=length)
        length, labels = found["max_length"], max(1, math.ceil(found["label_tokens"] / max(1, found["rows"])))
        classes = found["classes"]
    given = memory is not None
    room = advice.memory_of(memory) if memory is not None else models.available_memory(place)
    planner = Planner(
        advice.model_of(config, dtype, place, classes), advice.rows_of(batch, length or advice.default_length(config), labels)
    )
    told = advice.advise(planner, room, advice.cases(method, scheme))
    unknown = [row for row in told.rows if (row.reason or "").startswith(UNKNOWN)]
    if unknown and not measure:
        print(f"{unknown[0].reason}: two steps are made and measured instead, as with --measure", file=sys.stderr)
    real: dict[str, int | str] = {}
    for row in told.rows if measure else unknown:
        if row.plan is not None or row in unknown:
            real[row.case.key] = measured(planner, row.case)
    told = advice.with_measured(told, real)
    if as_json:
        print(json.dumps({**advice.as_json(told), **({"measured": real} if real else {})}, indent=2))
    else:
        _show(model, told, given, real)
    raise typer.Exit(0 if told.chosen is not None else 3)


def _show(model: str, told: Any, given: bool, real: dict[str, int | str]) -> None:
    from smidgen import advice
    from smidgen.tables import table

    b, m = told.planner.rows, told.planner.model
    free = "" if given else " free"
    print(
        f"{model}, batch {b.rows} x {b.length} tokens, {str(m.dtype).removeprefix('torch.')} on {m.device}, "
        f"{advice.size(told.memory)}{free}"
    )
    heads, lines = advice.table(told)
    if real:
        heads = (*heads[:-1], "measured", heads[-1])
        shown = [real.get(row.case.key, "-") for row in told.rows]
        cells = [f"{value / advice.GIB:.2f}" if isinstance(value, int) else value for value in shown]
        lines = [(*line[:-1], cell, line[-1]) for line, cell in zip(lines, cells, strict=True)]
    table(heads, lines)
    if sys.stdout.isatty():
        print(_HEADING)
    print(told.recommendation())
    for row in told.rows:
        change = told.change(row.case) if row.fit == "no" and row.plan is not None else None
        if change:
            print(change)
