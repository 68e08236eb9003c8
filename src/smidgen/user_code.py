"""A function of the user's, by name: `module:function`, from the current folder or an installed module.

Importing a module runs it. Nothing is imported unless a name is given on the command line, in Python or in a configuration
that the user starts; a run's folder is no place that code is looked for in.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from smidgen.config import ConfigError, nearest


def function(name: str, key: str, takes: tuple[str, ...]) -> Callable[..., Any]:
    """The function `module:function`, which can be called with as many values as `takes` names. key: where the name was given.

    Raises ConfigError: no such form, no such module or function, an error while the module is imported, other arguments.
    """
    where, colon, attribute = name.partition(":")
    if not colon or not where or not attribute:
        raise ConfigError(f"{key} = {name!r}: write module:function, such as my_rewards:{attribute or 'reward'}")
    if where.endswith(".py") or "/" in where:
        module = where.removesuffix(".py").replace("/", ".").strip(".")
        raise ConfigError(f"{key} = {name!r}: name the module, not its file: {module}:{attribute}")
    found = getattr(_module(where, name, key), attribute, None)
    if found is None:
        names = [n for n, value in vars(sys.modules[where]).items() if callable(value) and not n.startswith("_")]
        close = nearest(attribute, names)
        way_out = f"did you mean {where}:{close}?" if close else f"it has {', '.join(names) or 'no function'}"
        raise ConfigError(f"{key} = {name!r}: {where} has no {attribute!r}: {way_out}")
    if not callable(found):
        raise ConfigError(f"{key} = {name!r} is a {type(found).__name__}: name a function of ({', '.join(takes)})")
    try:
        inspect.signature(found).bind(*takes)
    except TypeError as error:
        raise ConfigError(f"{key} = {name!r} cannot be called with ({', '.join(takes)}): {error}") from None
    except ValueError:  # a built-in tells no signature
        pass
    return found


def _module(where: str, name: str, key: str) -> Any:
    """Import a module with the current folder first, as `python -m` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise ConfigError(
                f"{key} = {name!r}: there is no module {error.name!r} in the current folder or installed: start smidgen in the "
                f"folder of {error.name.split('.')[-1]}.py"
            ) from None
        raise ConfigError(f"{key} = {name!r}: {where} imports {error.name!r}, which is not installed") from None
    except Exception as error:
        raise ConfigError(f"{key} = {name!r}: importing {where} raised {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
