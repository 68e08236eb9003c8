"""Memory as measured: resident bytes of this process and their peak, or the device's allocated peak."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

_PROC = Path("/proc/self")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def _on_cuda() -> bool:
    return torch.cuda.is_available()


def resident() -> int:
    """Bytes in use now: allocated on CUDA where there is one, else resident memory."""
    if _on_cuda():
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Start a new measurement of the peak (Linux and CUDA; elsewhere the peak is that of the process)."""
    if _on_cuda():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def peak() -> int:
    """Highest number of bytes in use since `reset_peak`."""
    if _on_cuda():
        return torch.cuda.max_memory_allocated()
    status = _PROC / "status"
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_at(size: int) -> bool:
    """From now on give freed blocks of `size` bytes and more back to the system at once; whether that can be asked for.

    glibc's malloc does so from a threshold on that it raises up to 32 MiB by itself; below it, freed activations stay in the
    heap as holes, and count as resident.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, size)) and bool(mallopt(_M_TRIM_THRESHOLD, size))


def warm_up() -> None:
    """Load what every run loads anyway (kernels, autograd, matrix libraries), so that it is not counted as the run's."""
    from smidgen import noise

    address = noise.Address(0, 0, 0, 0, noise.PROBE)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(1 << 16, dtype=dtype)
        noise.displace_(torch.empty_like(weight), weight, [(address, 1.0)], "rademacher")
        noise.update_(weight, [(address, 1.0)], "rademacher", at=address)
    with torch.enable_grad():
        x = torch.zeros(64, 64, requires_grad=True)
        torch.nn.functional.layer_norm(x @ x, (64,)).sum().backward()
