"""The ends that a run can meet, each as a sentence with an exit code, noted in its folder."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from smidgen import folder as folders
from smidgen import world
from smidgen.config import MemoryRefused, RunConfig, UserError
from smidgen.exhausted import explain


@dataclass
class Start:
    """One start of a run in its folder."""

    folder: Path
    begun: bool  # whether anything of it stands in the folder; until then a refusal leaves the folder as it was


@contextlib.contextmanager
def explained(config: RunConfig, folder: Path, device: str) -> Iterator[Start]:
    """Turn the ends that a run can meet into a sentence with an exit code, and note them in result.json."""
    start = Start(folder, begun=config.resume)
    try:
        try:
            yield start
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            raise UserError(
                f"{error.strerror} while writing {error.filename or folder}: the steps made are kept in the journal or the "
                f"last checkpoint; make room and run `smidgen train --resume --output {folder}`"
            ) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MemoryRefused(explain(config, error, folder, start.begun, device)) from error
        except RuntimeError as error:
            if "not enough memory" in str(error):
                raise MemoryRefused(explain(config, error, folder, start.begun, device)) from error
            if "No space left" in str(error):
                raise UserError(str(error)) from error
            raise
    except UserError as error:
        status = {4: "diverged", 75: "interrupted"}.get(error.exit_code, "failed")
        with contextlib.suppress(OSError):
            if not world.leads():
                pass
            elif start.begun:
                folders.write_json(folder / folders.RESULT, {"status": status, "reason": str(error)})
            else:
                folders.withdraw(folder)
        raise
