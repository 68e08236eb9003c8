"""What a run needs, before anything of it is loaded: bytes by term and passes of the model, for every method and scheme.

    weights      the model and its adapter, as stored
    gradients    of the tuned tensors, all alive at the end of the backward pass
    optimizer    what the method declares (`state_bytes`)
    activations  what the forward needs at once, or keeps for the backward pass
    logits       the output head's part of the peak
    scratch      displaced copies that a probe needs, and the workspace of the update

Nothing here is a formula of an architecture: forwards and backward passes are simulated (`smidgen.simulate`), optimizers
declare their state, and the passes of a step are counted by letting the method make one with a stand-in for the model.

Does not see: what libraries keep for themselves, fragmentation, the data loader; `measure` of `smidgen plan --measure` does.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smidgen import activations, adapt, depths, optim, simulate
from smidgen.batched import MEMORY
from smidgen.config import ConfigError
from smidgen.directions import Direction, Probe
from smidgen.kinds import Kind
from smidgen.loss import BLOCK_ELEMENTS, WIDE_BLOCK
from smidgen.optim._optimizer import Outcome
from smidgen.params import Entry, ParamView, shapes, tensor_id
from smidgen.perturbed import Draw
from smidgen.probing import AT_ONCE
from smidgen.readers import aligned
from smidgen.reuse import stacks
from smidgen.simulate import Rows, Trace

Keep = Literal["all", "checkpointing", "velora"]  # activations of the backward pass

KEPT = {"all": "", "checkpointing": "_checkpointed", "velora": "_velora"}

_SIDE = 32  # longest side of the stand-ins for tuned tensors with which the passes of a step are counted
_UPDATE = 1 << 20  # elements of the blocks in which an update works


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded."""

    config: Any  # a transformers configuration
    kind: Kind
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    classes: int | None = None
    quantise: str | None = None  # how its linear layers but the output head are held: nf4, int8


@dataclass(frozen=True)
class Case:
    """One way to tune a model."""

    method: str
    scheme: str = "full"
    keep: Keep = "all"
    options: Mapping[str, Any] | None = None
    scheme_options: Mapping[str, Any] | None = None
    quantise: str | None = None  # how the base is held, where not as the model says: nf4, int8
    activations_options: Mapping[str, Any] | None = None  # of keep = velora

    @property
    def key(self) -> str:
        """A name for records."""
        return f"{self.scheme}_{self.method}{KEPT[self.keep]}" + (f"_{self.quantise}" if self.quantise else "")

    @property
    def label(self) -> str:
        """As a table names it."""
        kept = "" if self.keep == "all" else f" + {self.keep}"
        return self.method + kept + (f" + {self.quantise}" if self.quantise else "")


@dataclass(frozen=True)
class Passes:
    """What a step asks of the model."""

    forwards: int  # without gradient
    backwards: int  # each with a forward of its own
    slopes: int  # forwards that carry a tangent
    together: int  # probes that it asks for at once
    below: frozenset[str] = frozenset()  # tensors that the backward pass leaves out


@dataclass(frozen=True)
class Terms:
    """Bytes at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scratch: int

    def values(self) -> list[int]:
        """The terms in their order, and their total."""
        terms = [getattr(self, field.name) for field in fields(self)]
        return [*terms, sum(terms)]

    @property
    def total(self) -> int:
        return self.values()[-1]

    @property
    def over_weights(self) -> int:
        """All but the weights."""
        return self.total - self.weights


@dataclass(frozen=True)
class Plan:
    """A case and what it needs."""

    case: Case
    terms: Terms
    passes: Passes
    tuned: int  # weights


class Counter:
    """An objective that counts what it is asked, and answers with numbers of no meaning."""

    key = 0

    def __init__(self, view: ParamView):
        self.view = view
        self.passes = Passes(0, 0, 0, 0)

    def losses(self, probes: Sequence[Probe], *, each: bool = False) -> Tensor:
        p = self.passes
        self.passes = replace(p, forwards=p.forwards + len(probes), together=max(p.together, len(probes)))
        answers = 1.0 + 0.01 * torch.arange(1, len(probes) + 1, dtype=torch.float64)
        return answers[:, None].expand(-1, 2) * torch.tensor([1.0, 1.1]) if each else answers

    def slope(self, direction: Direction) -> tuple[float, float]:
        self.passes = replace(self.passes, slopes=self.passes.slopes + 1)
        return 1.0, 0.1

    def backward(self, names: Iterable[str] | None = None, *, dropout: bool = True) -> float:
        chosen = set(self.view.entries if names is None else names)
        below = frozenset(self.view.entries) - chosen
        self.passes = replace(self.passes, backwards=self.passes.backwards + 1, below=below)
        for name in chosen:
            self.view[name].tensor.grad = torch.full_like(self.view[name].tensor, 1e-3)
        return 1.0

    def output_sizes(self, names: Sequence[str]) -> dict[str, float]:
        self.passes = replace(self.passes, forwards=self.passes.forwards + 1)
        return dict.fromkeys(names, 1.0)

    def perturbed(self, names: Sequence[str], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        self.passes = replace(self.passes, forwards=self.passes.forwards + 2)
        matrices = {name: self.view[name].tensor for name in names if self.view[name].tensor.ndim == 2}
        losses = torch.tensor([[1.0, 1.1], [1.01, 1.09]], dtype=torch.float64)
        return losses, {name: torch.ones(2, tensor.shape[1]) for name, tensor in matrices.items()}

    def input_squares(self, names: Sequence[str], onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        self.passes = replace(self.passes, forwards=self.passes.forwards + 1)
        if onto is not None:
            return {name: onto[name].double() for name in names}
        return {name: torch.ones(1, self.view[name].tensor.shape[1], dtype=torch.float64) for name in names}


def passes(method: str, options: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> Passes:
    """What the second step of a method asks of the model: counted with small tensors under the tuned tensors' names."""
    small = [
        Entry(name, tensor_id(name), nn.Parameter(torch.full([min(n, _SIDE) for n in shape], 0.5)))
        for name, shape in sizes.items()
    ]
    view = ParamView(small)
    module = optim.get(method)
    optimizer = module.build(view, module.Config(**options))
    counter = Counter(view)
    for _ in range(2):
        counter.passes = Passes(0, 0, 0, 0)
        optimizer.step(counter)
    outcome: Outcome | None = optimizer.outcome
    assert outcome is not None
    return counter.passes


class Planner:
    """Plans of one model at one batch; simulations are shared by the cases that need the same ones."""

    def __init__(self, model: Model, rows: Rows):
        self.model, self.rows = model, rows
        self._trace = functools.cache(self._simulate)
        self._view = functools.cache(self._tuned)
        self._built = functools.cache(self._without_storage)
        self._mode = simulate.mode()
        self._over = functools.cache(lambda quantise: Planner(replace(model, quantise=quantise), rows))

    def passes(self, case: Case) -> tuple[Passes, dict[str, int]]:
        """What a step of a case asks of the model, and the sizes of the tuned tensors. Raises ConfigError as `plan` does."""
        tuned, _, _ = self._view(case.scheme, _frozen(case.scheme_options))
        sizes = {name: shape for name, (shape, _) in tuned.items()}
        return passes(case.method, dict(case.options or {}), sizes), {name: math.prod(size) for name, size in sizes.items()}

    def plan(self, case: Case) -> Plan:
        """What a case needs. Raises ConfigError where the scheme or the method refuses the model."""
        if case.quantise is not None and case.quantise != self.model.quantise:
            return replace(self._over(case.quantise).plan(replace(case, quantise=None)), case=case)
        module = optim.get(case.method)
        options = dict(case.options or {})
        tuned, scratch, count = self._view(case.scheme, _frozen(case.scheme_options))
        config = module.Config(**options)
        sizes = {name: shape for name, (shape, _) in tuned.items()}
        found = passes(case.method, options, sizes)
        compressed = self._compressed(case) if found.backwards else {}
        state = module.build.state_bytes({**tuned, **(compressed if module.build.compressed else {})}, config)
        terms = (
            [self._by_forwards(case, found, tuned, state, scratch, module.build.lazy)] if found.forwards or found.slopes else []
        )
        if found.backwards:
            reached = {n: t for n, t in {**tuned, **compressed}.items() if n not in found.below}
            terms.append(self._by_backward(case, reached, found, state))
        return Plan(case, max(terms, key=lambda t: t.total), found, count)

    # -- terms --------------------------------------------------------------------------------------------------------

    def _by_forwards(self, case: Case, found: Passes, tuned: Mapping[str, Any], state: int, scratch: int, lazy: bool) -> Terms:
        t = self._trace(case.scheme, _frozen(case.scheme_options), "all", False, 1)
        if lazy and (many := min(found.together, max(1, MEMORY // t.trunk))) > 1:
            t = self._trace(case.scheme, _frozen(case.scheme_options), "all", False, many)
        update = _workspace(tuned)
        times = 2 if found.slopes else 1  # a tangent beside every activation, and beside every displaced weight
        return Terms(
            weights=t.weights,
            gradients=0,
            optimizer=state,
            activations=times * t.body,
            logits=times * (t.trunk - t.body),
            scratch=update if lazy else times * scratch + update,
        )

    def _by_backward(self, case: Case, tuned: Mapping[str, Any], found: Passes, state: int) -> Terms:
        t = self._trace(
            case.scheme, _frozen(case.scheme_options), case.keep, True, 1, found.below, _frozen(case.activations_options)
        )
        held = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tuned.values())
        largest = max(math.prod(shape) for shape, _ in tuned.values())
        wide = any(dtype.itemsize < 4 for _, dtype in tuned.values())
        update = _workspace(tuned) + (8 * largest if wide else 0)  # a float32 copy of one 16-bit tensor, and of its gradient
        if held + update > t.backward:  # the update decides the peak: by then the activations are gone
            return Terms(t.weights, held, state, 0, 0, update)
        gradients = min(held, t.backward)
        logits = min(max(0, t.start - t.saved), t.backward - gradients)
        return Terms(t.weights, gradients, state, t.backward - gradients - logits, logits, 0)

    # -- simulations --------------------------------------------------------------------------------------------------

    def _adapted(self, config: Any, scheme: str, options: Mapping[str, Any]) -> Any:
        model = simulate.build(config, self.model.kind, self.model.dtype, self.model.classes)
        if self.model.quantise is not None:
            simulate.quantised(model)
        module = adapt.get(scheme)
        return module.build(model, module.Config(**options), seed=0, fresh=[])

    def _simulate(
        self,
        scheme: str,
        options: tuple[tuple[str, Any], ...],
        keep: Keep,
        backward: bool,
        many: int,
        below: frozenset[str] = frozenset(),
        policy: tuple[tuple[str, Any], ...] = (),
    ) -> Trace:
        batch = replace(self.rows, rows=self.rows.rows * many)

        def once(config: Any) -> Trace:
            adapted = self._built(scheme, options, depths.depth(config))
            installed = compress(adapted, dict(policy)) if keep == "velora" else None
            try:
                with self._mode, _frozen_below(adapted.view, below), simulate.keeping(adapted.model, keep):
                    return simulate.trace(
                        adapted.model, self.model.kind, batch, backward=backward, quantise=self.model.quantise
                    )
            finally:
                if installed is not None:
                    installed.remove()

        return once(self.model.config) if below else depths.of_depth(self.model.config, once)

    def _compressed(self, case: Case) -> dict[str, Any]:
        """Shapes of the gradients of the weights that keep = velora compresses, by name."""
        if case.keep != "velora":
            return {}
        adapted = self._adapted(self.model.config, case.scheme, case.scheme_options or {})
        plain = shapes(adapted.view)
        found = compress(adapted, case.activations_options or {}).gradient_shapes(plain)
        return {name: of for name, of in found.items() if of != plain[name]}

    def _without_storage(self, scheme: str, options: tuple[tuple[str, Any], ...], layers: int | None) -> Any:
        """The adapted model with so many layers, its tensors without storage: one for all simulations that need it."""
        config = self.model.config
        if layers is not None and layers != depths.depth(config):
            config = depths.shallower(config, layers)
        adapted = self._adapted(config, scheme, dict(options))
        with self._mode:
            simulate.strip(adapted.model, self.model.device)
        return adapted

    def _tuned(self, scheme: str, options: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Any], int, int]:
        """(shapes of the tuned tensors, scratch of a displaced forward, tuned weights)"""
        found_depths = depths.few(self.model.config)
        if found_depths is None:
            adapted = self._adapted(self.model.config, scheme, dict(options))
            return shapes(adapted.view), scratch_bytes(adapted.model, adapted.view, self.model.device), adapted.view.numel()
        whole, low, high = found_depths
        two = [self._built(scheme, options, layers) for layers in (low, high)]
        found = depths.deepened(*(shapes(adapted.view) for adapted in two), found_depths)  # type: ignore[arg-type,call-arg]
        first, second = (scratch_bytes(adapted.model, adapted.view, self.model.device) for adapted in two)
        scratch = first + (second - first) // (high - low) * (whole - low)
        return found, scratch, sum(math.prod(shape) for shape, _ in found.values())


@contextlib.contextmanager
def _frozen_below(view: ParamView, names: Iterable[str]) -> Iterator[None]:
    """Inside, these tensors have no gradient."""
    found = [getattr(owner, attribute) for name in names for owner, attribute in view[name].sites]
    held = [tensor for tensor in found if tensor.requires_grad]
    for tensor in held:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in held:
            tensor.requires_grad_(True)


def compress(adapted: Any, options: Mapping[str, Any]) -> Any:
    """The policy `velora` installed in an adapted model. Raises ConfigError where nothing can be compressed."""
    policy = activations.get("velora")
    return policy.build(adapted.model, policy.Config(**options), view=adapted.view)


def scratch_bytes(model: nn.Module, view: ParamView, device: str) -> int:
    """Bytes of the displaced copies of a dense probe: the largest group of tensors that one module reads (one layer, on
    devices that displace them at once), and a block of the output head. Embeddings displace the rows that they look up."""
    head = simulate.output_head(model)
    at_once = torch.device(device).type in AT_ONCE
    layers = {id(m): id(layer) for stack in stacks(model) for layer in stack for m in layer.modules()} if at_once else {}
    elements = WIDE_BLOCK if at_once else BLOCK_ELEMENTS
    groups: dict[int, int] = {}
    block = 0
    for entry in view:
        size = entry.tensor.numel() * entry.tensor.element_size()
        for owner, attribute in entry.sites:
            if owner is head:
                block = max(block, min(size, elements * entry.tensor.element_size()))
            elif not (isinstance(owner, nn.Embedding) and attribute == "weight"):
                group = layers.get(id(owner), id(owner))
                groups[group] = groups.get(group, 0) + aligned(size)
    return max(groups.values(), default=0) + block


def _workspace(tuned: Mapping[str, Any]) -> int:
    """Bytes in which an update works: three float32 blocks of the largest tensor."""
    return 12 * min(_UPDATE, max(math.prod(shape) for shape, _ in tuned.values()))


def _frozen(options: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((options or {}).items()))


UNKNOWN = "cannot be simulated"  # begins the reason of a case that only measuring tells about


def refused(planner: Planner, case: Case) -> Plan | str:
    """The plan of a case, or why there is none."""
    try:
        return planner.plan(case)
    except ConfigError as error:
        return str(error)
    except Exception as error:  # an architecture may do anything in its forward
        return f"{UNKNOWN} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
