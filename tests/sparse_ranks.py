"""One rank of SpIEL's two-rank test: argv = folder. `run` is also what one process does alone."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import batch, make
from smidgen import adapt
from smidgen.adapt import _ranks
from smidgen.config import UserError
from smidgen.objective import ModelObjective
from smidgen.optim.sparse_adamw import SparseAdamW
from smidgen.probing import Engine

spiel = adapt.get("spiel")
drawing = threading.Lock()  # models are drawn from the global generator, which ranks that are threads share


class Share:
    """The objective of one rank's half of a batch: its gradients are shares of the whole, and summed."""

    key = None

    def __init__(self, engine, micro):
        self.engine, self.micro = engine, micro

    def losses(self, probes, **_):
        raise NotImplementedError

    def backward(self, names=None, **_):
        nll = self.engine.differentiable(self.micro).nll
        loss = nll.sum() / (_ranks.count() * nll.numel())
        loss.backward()
        for shared in [*(entry.tensor.grad for entry in self.engine.view), loss := loss.detach()]:
            _ranks.add_(shared)
        return float(loss)


def built(seed=3, **options):
    with drawing:
        kind, model = make("llama-untied")
    return kind, spiel.build(model, spiel.Config(**options), seed=seed)


def run(rank=None):
    """Seven updates with two selections, of two halves here, or of this rank's: (positions, deltas) of each matrix."""
    kind, found = built(every=4, collect=2, density=0.1)
    opt = SparseAdamW(found.view, lr=1e-2)
    found.begin(opt)
    engine = Engine(found.model, found.view, kind)
    for t in range(7):
        micro = [batch(kind, seed=10 * t + half, labels="all") for half in (0, 1)]
        opt.step(ModelObjective(engine, micro) if rank is None else Share(engine, micro[rank]))
        found.after_step(opt, 100)
    return {n: (s.index, s.delta.detach().clone()) for n, s in found.sites.items()}


def raised(call):
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing"


def one(rank):
    """What a rank ends with, and the errors that it raises."""
    ends = run(rank)
    apart, published = built(seed=rank)[1], built(compat_collect=True)[1]
    errors = [
        raised(lambda: _ranks.checked({"a": (torch.arange(3),), "b": (torch.tensor([rank]),)})),
        raised(lambda: apart.begin(SparseAdamW(apart.view))),
        raised(lambda: published.begin(SparseAdamW(published.view))),
    ]
    return {"ends": ends, "errors": errors}


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(one(rank), Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
