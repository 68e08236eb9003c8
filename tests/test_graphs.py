"""Captured evaluations, with a recorder that runs again what it was given in place of a CUDA graph: what is read from where,
and when nothing is captured. On a GPU: tests/gpu/test_graphs_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from families import batch, make
from smidgen import batched as batching
from smidgen import graphs, noise, probing
from smidgen.batched import BatchedEngine
from smidgen.directions import Dense
from smidgen.gathered import Gathered
from smidgen.lowrank import Accumulated, LowRank, matrices
from smidgen.params import ParamView
from smidgen.population import Population
from smidgen.probing import Engine


class Recorder:
    """Counts captures and replays; a replay is another run. A capture writes only where the run before it has written: no table
    of addresses can be copied to the device within it."""

    def __init__(self):
        self.captures = self.replays = 0
        self.written = set()

    def __call__(self, run, pool):
        self.captures += 1
        before = set(self.written)
        run()
        assert self.written == before

        def replay():
            self.replays += 1
            run()

        return replay, pool

    def all_(self, outs, *rest, **options):
        self.written.add(tuple(out.data_ptr() for out in outs))
        return all_(outs, *rest, **options)


all_ = noise.all_


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(graphs, "record_graph", found)
    monkeypatch.setattr(noise, "all_", found.all_)
    monkeypatch.setattr(probing, "DEVICES", ("cpu",))
    monkeypatch.setattr(batching, "DEVICES", ("cpu",))
    monkeypatch.setattr(probing, "AT_ONCE", ("cpu",))
    return found


def engines(family, dtype=torch.float32):
    """One whose evaluations are captured, one without, and rows."""
    kind, model = make(family, dtype)
    view = ParamView.of_model(model)
    ours, plain = Engine(model, view, kind), Engine(model, view, kind)
    plain.graphs = None
    return kind, model, view, ours, plain


def step_losses(engine, rows, probe):
    """Those of one probe in a step."""
    return engine.together(rows, [probe])[0]


def direction(view, **changed):
    return Dense(**{"seed": 2**63 + 5, "step": 3, "query": 1, "ids": view.ids, **changed})


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied", "roberta-masked", "t5-tied", "bert-classification", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_have_the_bits_of_ordinary_evaluations(family, dtype, recorder):
    """Of one graph along other directions, at other scales and for other rows; at theta too."""
    kind, _, view, ours, plain = engines(family, dtype)
    for seed in (0, 1):
        rows = batch(kind, rows=3, seed=seed)
        for probe in [
            (),
            *([(direction(view, step=s, seed=2**64 - 1 - s), scale)] for s in (1, 2**32 - 1) for scale in (0.1, -0.2)),
        ]:
            a, b = step_losses(ours, rows, probe), step_losses(plain, rows, probe)
            assert torch.equal(a.nll, b.nll) and torch.equal(a.rows, b.rows) and a.size == b.size
    assert (ours.forwards, ours.tokens) == (plain.forwards, plain.tokens)
    assert ours.graphs.reason is None
    assert recorder.captures == 2, "one of theta, one along a direction"
    assert recorder.replays == 2 * 5 + 1, "each evaluation, and the comparison of the first graph"


def test_each_shape_has_a_graph_of_its_own_and_old_ones_go(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    kind, _, view, ours, plain = engines("opt-tied")
    probe = [(direction(view), 0.1)]
    for rows in (2, 3, 4, 2):
        data = batch(kind, rows=rows)
        assert torch.equal(step_losses(ours, data, probe).nll, step_losses(plain, data, probe).nll)
    assert recorder.captures == 4
    step_losses(ours, batch(kind, rows=4), probe)
    assert recorder.captures == 4


def test_weights_elsewhere_are_captured_again(recorder):
    kind, model, view, ours, _ = engines("opt-tied")
    data, probe = batch(kind), [(direction(view), 0.1)]
    before = step_losses(ours, data, probe).nll
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data * 1.5
    after = step_losses(ours, data, probe).nll
    assert recorder.captures == 2 and not torch.equal(before, after)


@pytest.mark.parametrize("kind_of", ["two", "rademacher and gaussian", "support"])
def test_sums_are_run_and_other_directions_are_captured_apart(kind_of, recorder):
    kind, _, view, ours, plain = engines("opt-tied")
    z, name = direction(view), next(iter(view)).name
    probes = {
        "two": [[(z, 0.1), (direction(view, step=9), 0.1)]],
        "rademacher and gaussian": [[(z, 0.1)], [(direction(view, distribution="gaussian"), 0.1)]],
        "support": [[(z, 0.1)], [(direction(view, support=frozenset({name})), 0.1)]],
    }[kind_of]
    data = batch(kind)
    for probe in probes:
        assert torch.equal(step_losses(ours, data, probe).nll, step_losses(plain, data, probe).nll)
    assert recorder.captures == (0 if kind_of == "two" else 2)


def test_what_is_compared_comes_from_the_same_kernels(recorder):
    """A sum beside theta: neither is replayed. Outside a step nothing is."""
    kind, _, view, ours, plain = engines("opt-tied")
    data, z, other = batch(kind), direction(view), direction(view, step=9)
    probes = [(), [(z, 0.1), (other, 0.1)]]
    assert all(
        torch.equal(a.nll, b.nll) for a, b in zip(ours.together(data, probes), plain.together(data, probes), strict=True)
    )
    ours.losses(data)
    ours.losses(data, [(z, 0.1)])
    assert recorder.captures == 0
    ours.together(data, [(), [(z, 0.1)]])
    assert recorder.captures == 2


def test_a_hook_that_looks_at_the_model_sees_every_evaluation(recorder):
    kind, model, view, ours, _ = engines("opt-tied")
    data, probe, seen = batch(kind), [(direction(view), 0.1)], []
    step_losses(ours, data, probe)
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    step_losses(ours, data, probe)
    handle.remove()
    step_losses(ours, data, probe)
    assert len(seen) == 1 and recorder.captures == 1


def test_what_cannot_be_captured_is_run_and_said_once(recorder, monkeypatch, caplog):
    def fails(run, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(graphs, "record_graph", fails)
    kind, _, view, ours, plain = engines("opt-tied")
    data, probe = batch(kind), [(direction(view), 0.1)]
    for _ in range(2):
        assert torch.equal(step_losses(ours, data, probe).nll, step_losses(plain, data, probe).nll)
    assert [r.message for r in caplog.records if "captured" in r.message] == [
        "evaluations are not captured as CUDA graphs: CUDA error: operation not permitted when stream is capturing"
    ]


def test_a_replay_that_gives_something_else_is_not_trusted(recorder, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "record_graph", lambda run, pool: (lambda: None, pool))  # a replay that does nothing
    kind, _, view, ours, plain = engines("opt-tied")
    data, probe = batch(kind), [(direction(view), 0.1)]
    assert torch.equal(step_losses(ours, data, probe).nll, step_losses(plain, data, probe).nll)
    assert "differs from an evaluation" in caplog.text


def test_a_model_that_keeps_its_own_head_is_run(recorder):
    kind, _, view, ours, _ = engines("opt-tied")
    data = batch(kind)
    ours.check_batch(data)
    ours.own_head = True
    step_losses(ours, data, [(direction(view), 0.1)])
    assert recorder.captures == 0


# -- populations -----------------------------------------------------------------------------------------------------------


def crowd(view, step, queries=2, offset=None, rank=2):
    """Mirrored low-rank probes around what has accumulated, as lozo and es ask for them."""
    shapes = matrices(view)
    subspace = LowRank(7, 0, 0, view.ids, shapes, rank, 0, torch.device("cpu"))
    Z = [LowRank(7, step, i, view.ids, shapes, rank, 0, torch.device("cpu")) for i in range(queries)]
    base = [(Accumulated(offset, subspace), 1.0)] if offset else []
    return [[*base, (z, scale)] for z in Z for scale in (0.1, -0.1)]


def batched(family, monkeypatch, dtype=torch.float32):
    """Engines that evaluate probes together: captured, drawn at once without graphs, and as on a CPU."""
    kind, model = make(family, dtype)
    view = ParamView.of_model(model)
    ours, gathered = (BatchedEngine(model, view, kind, memory=1 << 30) for _ in range(2))
    gathered.graphs = None
    plain = BatchedEngine(model, view, kind, memory=1 << 30)
    plain.graphs = None
    monkeypatch.setattr(plain, "_population", Population)
    return kind, view, ours, gathered, plain


FAMILIES = ["opt-tied", "llama-untied", "roberta-masked", "bert-classification", "gpt2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_population_is_replayed_with_the_bits_of_one_that_is_run(family, dtype, recorder, monkeypatch):
    kind, view, ours, gathered, plain = batched(family, monkeypatch, dtype)
    made = torch.Generator().manual_seed(0)
    held = {n: torch.randn(m, min(2, m, k), generator=made) / 50 for n, (m, k) in matrices(view).items()}
    for seed in (0, 1):
        rows = batch(kind, rows=3, seed=seed)
        for step, offset in ((0, None), (1, held), (2**32 - 1, held)):
            probes = crowd(view, step, offset=offset)
            a, b, c = (engine.together(rows, probes) for engine in (ours, gathered, plain))
            assert all(torch.equal(x.nll, y.nll) and torch.equal(x.rows, y.rows) for x, y in zip(a, b, strict=True))
            close = 1e-6 if dtype == torch.float32 else 0.0  # products of views may sum in another order
            assert all(torch.allclose(x.nll, y.nll, rtol=0, atol=close) for x, y in zip(b, c, strict=True))
    assert ours._reason is None and ours.graphs.reason is None
    assert (ours.forwards, ours.tokens) == (plain.forwards, plain.tokens)
    assert recorder.captures == 1 and recorder.replays == 2 * 3 + 1


def test_a_population_beside_theta_in_another_subspace_and_of_another_size(recorder, monkeypatch):
    kind, view, ours, gathered, _ = batched("opt-tied", monkeypatch)
    rows = batch(kind, rows=3)
    fresh = [[(replace(z, subspace=5), scale)] for probe in crowd(view, 6) for z, scale in probe]
    for probes in ([(), *crowd(view, 1)], crowd(view, 1), fresh, crowd(view, 1, queries=3)):
        a, b = ours.together(rows, probes), gathered.together(rows, probes)
        assert all(torch.equal(x.nll, y.nll) for x, y in zip(a, b, strict=True))
    assert recorder.captures == 3, "one of each number of probes"


def test_a_population_that_is_not_drawn_at_once_is_run(recorder, monkeypatch):
    """Of two subspaces, and of directions that leave tensors alone."""
    kind, view, ours, _, plain = batched("opt-tied", monkeypatch)
    rows, probes = batch(kind, rows=3), crowd(view, 1)
    two = [[(replace(z, subspace=n), scale) for z, scale in probe] for n, probe in enumerate(probes)]
    some = frozenset(list(view.entries)[:3])
    few = [[(replace(z, support=some), scale) for z, scale in probe] for probe in probes]
    for others in (two, few):
        a, b = ours.together(rows, others), plain.together(rows, others)
        assert all(torch.equal(x.nll, y.nll) for x, y in zip(a, b, strict=True))
    assert recorder.captures == 0


def test_factors_drawn_at_once_have_the_bits_of_those_drawn_alone(recorder):
    view = ParamView.of_model(make("opt-tied")[1])
    held = {n: torch.full((m, min(5, m, k)), 1 / 3) for n, (m, k) in matrices(view).items()}
    probes, entries = crowd(view, 3, offset=held, rank=5), list(view)
    z = probes[0][1][0]
    people, alone = Gathered(len(probes), z, entries), Population(probes)
    people.put(probes)
    for entry in entries:
        if people.has_factors(entry.name):
            ours, theirs = people.factors(entry), alone.factors(entry)
        else:
            ours, theirs = [people.deltas(entry)], [alone.deltas(entry)]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), entry.name
    names = list(z.shapes)
    assert all(torch.equal(a, z.left(name)) for name, a in zip(names, z.lefts(names), strict=True))
