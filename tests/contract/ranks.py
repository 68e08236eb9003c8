"""One rank of the two-rank test: argv = folder, comma-separated methods. Also runs each method alone, on rank 0."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import batch, make
from smidgen import optim
from smidgen.objective import ModelObjective
from smidgen.params import ParamView
from smidgen.probing import Engine
from smidgen.ranks import Reduced

torch.set_num_threads(1)
folder, methods = Path(sys.argv[1]), sys.argv[2].split(",")
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for method in methods:
    module = optim.get(method)
    for alone in (False, True):
        kind, model = make("opt-tied")
        view = ParamView.of_model(model)
        engine = Engine(model, view, kind)
        optimizer = module.build(view, module.Config(lr=1e-4))
        halves = [batch(kind, seed=10, labels="all"), batch(kind, seed=11, labels="some")]
        for _ in range(3):
            objective = ModelObjective(engine, halves) if alone else Reduced(ModelObjective(engine, [halves[rank]]))
            optimizer.step(objective)
        torch.save({e.name: e.storage for e in view}, folder / f"{method}-{'alone' if alone else ''}{rank}.pt")
torch.distributed.destroy_process_group()
