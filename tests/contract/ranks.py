"""One rank of the two-rank test: argv = folder, comma-separated methods. Each method runs on ranks that share out the rows,
on ranks that share out the probes, and alone, on one of the two."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import batch, make
from smidgen import optim, world
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.ranks import Reduced

torch.set_num_threads(1)
folder, methods = Path(sys.argv[1]), sys.argv[2].split(",")
world.join()
rank = world.index()
halves = [batch("causal", seed=10, labels="all"), batch("causal", seed=11, labels="some")]


def objective(engine, how):
    inner = ModelObjective(engine, [halves[rank]] if how == "rows" else halves)
    return inner if how == "alone" else Reduced(inner, 2 if how == "probes" else 1)


for number, method in enumerate(methods):
    module = optim.get(method)
    ends = {}
    for how in ("rows", "probes", "alone"):
        if (how == "probes" and "backward" in module.build.uses) or (how == "alone" and number % 2 != rank):
            continue
        kind, model = make("opt-tied")
        view = ParamView.of_model(model)
        engine = Engine(model, view, kind)
        optimizer = module.build(view, module.Config(lr=1e-4))
        for _ in range(2):
            optimizer.step(objective(engine, how))
        ends[how] = {e.name: e.storage for e in view}
    torch.save(ends, folder / f"{method}-{rank}.pt")
torch.distributed.destroy_process_group()
