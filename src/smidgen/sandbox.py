"""Sandbox: run a generated Python program in a process of its own, with limits, and say whether it reached its end.

Limits: seconds of processor and of wall time, bytes of memory, an empty working folder, no environment, files of at most
1 MiB. Sockets, further processes, foreign libraries and writes outside the folder are refused by an audit hook, which
Python cannot take out again; where the system lets a user do so, the process has no network at all. It is a guard against
accidents, not against an attacker: run code of a model that you do not trust in a container.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass

__all__ = ["Ended", "run_program"]

SECONDS, MEMORY = 10.0, 1 << 30  # chosen: HumanEval's programs end in well under a second and 100 MB

_GUARD = """
import ctypes, os, sys
try:
    import resource
    for which, limit in (("CPU", {cpu}), ("AS", {memory}), ("FSIZE", 1 << 20), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + which), (limit, limit))
except ImportError:  # not a POSIX system: wall time alone
    pass
if sys.platform == "linux":
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user and a network name space of its own; refused in some containers
_here = os.path.realpath(os.getcwd())
_refused = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "ctypes.", "pty.",
    "shutil.rmtree",
)
_changes = (
    "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.mkdir"
)
def _hook(event, args, real=os.path.realpath, commonpath=os.path.commonpath, fs=os.fsdecode, here=_here):
    if event.startswith(_refused):
        raise PermissionError(event + " is refused here")
    if event in _changes or event == "open" and (
        isinstance(args[1], str) and set(args[1]) & set("wax+") or isinstance(args[2], int) and args[2] & 0o1103
    ):
        path = args[0]
        if not isinstance(path, int) and commonpath([real(fs(path)), here]) != here:
            raise PermissionError(event + " outside the working folder is refused here")
sys.addaudithook(_hook)
del ctypes, os, sys, _hook, _here
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {{"__name__": "__main__"}})
print({token!r})
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended: whether it ran to its last line, and if not, why."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Ended:
    """Run a program; passed means that its last line was reached without an error, not that it exited.

    Cost: a Python process, about 20 ms. Its output is dropped.
    """
    token = secrets.token_hex(16)
    guard = _GUARD.format(cpu=max(1, int(seconds)), memory=memory, token=token)
    with tempfile.TemporaryDirectory(prefix="smidgen-") as folder:
        with open(f"{folder}/program.py", "w", encoding="utf-8", errors="replace") as file:
            file.write(source)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", guard],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return Ended(False, f"no end within {seconds:g} s")
    if done.returncode == 0 and done.stdout.rstrip().endswith(token):
        return Ended(True, "")
    last = (done.stderr.strip().splitlines() or ["it ended before its last line"])[-1]
    return Ended(False, last[:200] if done.returncode >= 0 else f"ended by signal {-done.returncode}")
