"""Objects named on a command line: ``package.module:NAME`` or ``folder/file.py:NAME``, from outside of this package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

_REFERENCE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*|.+\.py):(?P<name>[^:/\\]+)")


def split_reference(text: str) -> tuple[str, str] | None:
    """Module (or file) and name of ``package.module:NAME``; None where a text has another form."""
    match = _REFERENCE.fullmatch(text)
    return None if match is None else (match["module"], match["name"])


def import_named_module(module: str) -> ModuleType:
    """The module of a reference, imported once; the current folder is looked into last, as `python -m` looks into it first.

    Raises:
        ImportError: if there is no such module or file, or it does not import; the message says which.
    """
    if module.endswith(".py"):
        return _import_file(Path(module).expanduser().resolve())
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise
    except Exception as error:
        raise ImportError(f"{module} does not import: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"  # another module has the name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled and found again
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ImportError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
