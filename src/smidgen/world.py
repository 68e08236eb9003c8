"""The processes of one run on torch.distributed: how they join, exchange a few floats, agree at the start, and are lost.

An exchange is a gather to rank 0 and a broadcast of what it makes of the parts, over gloo, also where weights are on CUDA
devices: all ranks get the same bits. Every exchange also carries whether a rank was told to stop, so that all ranks
stop after the same step. On one process nothing is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from smidgen import __version__
from smidgen.config import ConfigError, UserError

TIMEOUT = 1800.0  # seconds that a rank waits for a silent one; transformers' ddp_timeout

_FACT, _SHOWN = 96, 64  # bytes of an exchanged fact: its SHA-256, and the beginning of its text


class RankLost(UserError):  # noqa: N818 - what happened, not what broke
    """Another process of the run is gone; what was done is journalled."""

    exit_code = 75


class Traffic:
    """What this process has sent, and what it was told."""

    def __init__(self) -> None:
        self.sent = 0  # bytes of exchanges sent by this process so far; rank 0: to each of the others
        self.exchanges = 0
        self.asked: Callable[[], bool] = lambda: False  # whether this process was told to stop
        self.stop = False  # whether a process was told to stop, as of the last exchange; the same on all


traffic = Traffic()


def count() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """This process's rank."""
    return distributed.get_rank() if count() > 1 else 0


def leads() -> bool:
    """Whether this process writes the run's folder."""
    return index() == 0


def restarted() -> bool:
    """Whether torchrun has started this job again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def join(timeout: float = TIMEOUT) -> None:
    """Meet the other processes that a launcher's environment speaks of; nothing for one process. Takes the device of the
    local rank. Raises ConfigError where the environment is not whole, RankLost where others do not come."""
    size = _number("WORLD_SIZE", 1)
    if size == 1 or distributed.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start with "
            "torchrun or accelerate launch, which set them, or unset WORLD_SIZE for one process"
        )
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}: ranks count from 0 to {size - 1}")
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(f"LOCAL_RANK is {local}, and there are {torch.cuda.device_count()} CUDA devices: start as many")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with together(f"{size} ranks could not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"):
        limit = datetime.timedelta(seconds=timeout)
        store, _, _ = next(rendezvous("env://", timeout=limit))
        # torchrun's store outlives a restart, with the addresses of processes that are gone
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} = {text!r} is no whole number: start with torchrun or accelerate launch") from None


@contextlib.contextmanager
def together(what: str = "") -> Iterator[None]:
    """Turn what torch.distributed raises when a process is gone, or silent for too long, into RankLost."""
    try:
        yield
    except RuntimeError as error:
        if not _network(error):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[0].rpartition("] ")[2].partition(". ")[0].strip()  # without the place in torch's sources
        what = what or f"rank {index()} of {count()} lost another rank"
        raise RankLost(
            f"{what} ({reason[:100]}): nothing that was journalled is lost. The rank that failed first says why; torchrun with "
            "--max-restarts starts all again by itself, else start all with --resume"
        ) from None


def _network(error: RuntimeError) -> bool:
    """Whether an error comes from a connection, not from what was computed."""
    marks = ("closed by peer", "Connection re", "gloo", "Gloo", "NCCL", "imed out", "TCPStore", "rendezvous", "Broken pipe")
    return isinstance(error, distributed.DistError) or any(mark in str(error) for mark in marks)


@functools.cache
def _floats() -> distributed.ProcessGroup | None:
    """The group that floats on the CPU travel in: the default one, or beside one of NCCL alone a group of its own."""
    if "gloo" in distributed.get_backend_config():
        return None
    return distributed.new_group(backend="gloo")


def exchange(mine: Tensor, combine: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """What `combine` makes, on rank 0, of the vectors of all ranks, [ranks, n] -> [size], on every rank. float64."""
    n, ranks = mine.numel(), count()
    if ranks == 1:
        return combine(mine.double().cpu().view(1, n)).flatten()
    vector = torch.cat([mine.double().cpu().flatten(), torch.tensor([float(traffic.asked())], dtype=torch.float64)])
    answer = torch.empty(size + 1, dtype=torch.float64)
    with together():
        if leads():
            parts = [torch.empty_like(vector) for _ in range(ranks)]
            distributed.gather(vector, parts, group=_floats())
            table = torch.stack(parts)
            answer[:size] = combine(table[:, :n]).flatten()
            answer[size] = table[:, n].max()
            traffic.sent += answer.nbytes * (ranks - 1)
        else:
            distributed.gather(vector, group=_floats())
            traffic.sent += vector.nbytes
        distributed.broadcast(answer, 0, group=_floats())
    traffic.exchanges += 1
    traffic.stop = traffic.stop or bool(answer[size])
    return answer[:size]


def from_first(values: Sequence[float]) -> list[float]:
    """Rank 0's numbers, on every rank; as many on each."""
    if count() == 1:
        return list(values)
    mine = torch.tensor(list(values), dtype=torch.float64)
    return exchange(mine, lambda table: table[0], mine.numel()).tolist()


def add(table: Tensor) -> Tensor:
    """The sum over the first axis, float64, whatever the order of the parts: they are added by size."""
    ordered = table.sort(0).values
    total = ordered[0].clone()
    for part in ordered[1:]:
        total += part
    return total


def agree(facts: Mapping[str, str]) -> None:
    """Raise ConfigError, on every rank, that names the first fact in which ranks differ. The code comes first: of other
    code it is not known what else it would send. 96 bytes a fact."""
    if count() == 1:
        return
    _compare({"code": code()})
    _compare(facts)


def _compare(facts: Mapping[str, str]) -> None:
    tables = everywhere(torch.stack([_packed(text) for text in facts.values()]))
    for at, name in enumerate(facts):
        for rank, table in enumerate(tables):
            if not torch.equal(table[at], tables[0][at]):
                mine, other = (bytes(t[at, 32:].tolist()).rstrip(b"\0").decode(errors="replace") for t in (tables[0], table))
                shown = f"{mine!r} and {other!r}" if mine != other else f"both begin with {mine!r}"
                raise ConfigError(
                    f"ranks 0 and {rank} differ in their {name} ({shown}): start all ranks with the same code, model, data, "
                    "options and seed"
                )


def _packed(text: str) -> Tensor:
    shown = text.encode()[:_SHOWN].ljust(_SHOWN, b"\0")
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest() + shown), dtype=torch.uint8)


def everywhere(mine: Tensor) -> list[Tensor]:
    """A small tensor of every rank, on every rank, in the order of ranks; the same shape and dtype on each."""
    parts = [torch.empty_like(mine) for _ in range(count())]
    if count() == 1:
        return [mine]
    with together():
        distributed.all_gather(parts, mine, group=_floats())
    traffic.sent += mine.nbytes * (count() - 1)
    return parts


def code() -> str:
    """Versions, and a hash of this package's own files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"smidgen {__version__} {digest.hexdigest()[:12]}, torch {torch.__version__}, Python {platform.python_version()}"
