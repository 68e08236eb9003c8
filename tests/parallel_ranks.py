"""One of two ranks: argv = folder. What it ends with goes to FOLDER/RANK.pt; then rank 1 dies and rank 0 says what it sees."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import batch, make
from smidgen import world
from smidgen.config import UserError
from smidgen.directions import Dense
from smidgen.objective import ModelObjective
from smidgen.parallel import Parallel
from smidgen.params import ParamView
from smidgen.per_example import Each
from smidgen.probing import Engine
from smidgen.ranks import Reduced
from test_trainer import Rows, arguments

RUNS = {  # name: method, probe_ranks, options of the arguments on each of two ranks, and those that make one process the same
    "rows": ("zo_sgd", 1, {}, {"per_device_train_batch_size": 8}),
    "probes": ("zo_sgd", 2, {}, {}),
    "population": ("lozo", 2, {}, {}),
    "ddp": ("sgd", 1, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}),
    "hybrid": ("hybrid", 1, {}, {"per_device_train_batch_size": 8}),
}


# Adam divides a gradient that is zero but for rounding by its own size: no two orders of adding agree, so SGD it is.
OPTIONS = {"sgd": {"lr": 1e-2}, "hybrid": {"lr": 1e-4, "queries": 2, "first_order": "sgd", "top_lr": 1e-2}}


def train(name: str, folder: Path, alone: bool):
    """The tuned tensors after six steps, and the trainer."""
    import smidgen

    method, probe_ranks, options, same = RUNS[name]
    kind, model = make("opt-tied")
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # each rank draws its own
    trainer = smidgen.Trainer(
        model=model,
        args=arguments(folder / name, max_steps=6, **(same if alone else options)),
        train_dataset=Rows(32),
        kind=kind,
        method=method,
        method_args=OPTIONS.get(method, {"lr": 1e-4, "queries": 2}),
        probe_ranks=1 if alone else probe_ranks,
        check_ranks=2,
    )
    trainer.create_optimizer()
    trainer.engine.group = 2
    trainer.train()
    return {e.name: e.storage.clone() for e in trainer.stepper.view}, trainer


def directions(view, count, each=False):
    found = [Dense(7, 0, i, view.ids) for i in range(count)]
    return [((Each(z) if each else z, 1e-3),) for z in found]


def questions(rank: int | None, width: int):
    """Losses of three probes, and of each example, of four ragged micro-batches here or two on each of two ranks."""
    kind, model = make("opt-tied")
    view = ParamView.of_model(model)
    micro = [batch(kind, rows=r, seed=s, labels="all") for r, s in ((3, 1), (2, 2), (1, 3), (4, 4))]
    mine = micro if rank is None or width == 2 else micro[rank::2]
    objective = ModelObjective(Engine(model, view, kind), mine)
    if rank is not None:
        objective = Reduced(objective, width)
    return [
        objective.losses(directions(view, 3)),
        objective.losses(directions(view, 3), each=True),
        objective.losses(directions(view, 1, each=True), each=True),
    ]


def raised(call) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing"


def refusals(rank: int):
    _, model = make("opt-tied")
    view = ParamView.of_model(model)
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6 + rank]}]
    found = {
        "seed": raised(lambda: world.agree({"seed": str(rank), "model": "a"})),
        "data": raised(lambda: Parallel().agree({}, rows, 1)),
        "grid": raised(lambda: Parallel(probe_ranks=3)),
    }
    code, world.code = world.code, lambda: f"smidgen 0.{rank}"
    found["code"] = raised(lambda: world.agree({}))
    world.code = code
    parallel = Parallel(every=1)
    parallel.check(1, view, None)
    next(iter(view)).storage.view(-1)[0] += rank
    found["weights"] = raised(lambda: parallel.check(2, view, None))
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    world.join(timeout=60)
    rank = world.index()
    found = {"questions": [questions(rank, width) for width in (1, 2)], "refusals": refusals(rank), "ends": {}}
    for name in RUNS:
        before = world.traffic.sent, world.traffic.exchanges
        found["ends"][name], trainer = train(name, folder, alone=False)
        found[name] = (
            world.traffic.sent - before[0],
            world.traffic.exchanges - before[1],
            type(trainer.engine.wrapped).__name__,
        )
    torch.save(found, folder / f"{rank}.pt")
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    lost = raised(lambda: [world.from_first([0.0]) for _ in range(2)])
    torch.save((lost, time.monotonic() - begun), folder / "lost.pt")
    os._exit(0)


if __name__ == "__main__":
    main()
