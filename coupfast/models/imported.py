"""Modules that names of networks begin with, ``package.module:NAME`` or ``folder/file.py:NAME``: importing one registers them.

Unlike what `coupfast.naming` resolves, NAME need not be an attribute: registered names have hyphens.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

from coupfast.naming import import_place

_REFERENCE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*|.+\.py):(?P<name>[^:/\\]+)")


def split_reference(text: str) -> tuple[str, str] | None:
    """Module (or file) and name of ``package.module:NAME``; None where a text has another form."""
    match = _REFERENCE.fullmatch(text)
    return None if match is None else (match["module"], match["name"])


def import_named_module(module: str) -> ModuleType:
    """The module of a reference, imported once; also a file that was imported by a name of its own: it has registered.

    Raises:
        ImportError: if there is no such module or file, or it does not import; the message says which.
    """
    if module.endswith(".py"):
        path = str(Path(module).expanduser().resolve())
        for known in list(sys.modules.values()):
            if getattr(known, "__file__", None) == path:
                return known
    try:
        return import_place(module)
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise ImportError(str(error)) from error
    except Exception as error:
        raise ImportError(f"{module} does not import: {type(error).__name__}: {error}") from error
