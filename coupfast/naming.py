"""Objects of other people by name: "package.module:NAME", or "file.py:NAME" where there is no package.

Everything that can be added from outside (methods, attacks, defenses, networks) is named in this one way, on the command line
and in records of runs.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FORM = re.compile(r"(?P<place>[^:]+|[A-Za-z]:[^:]+):(?P<attribute>[A-Za-z_][\w.]*)")
_OF_FILE = "_coupfast_file_"  # how names of modules begin that were made from a file


class NamingError(ValueError):
    """A name that leads to nothing, or to something else than what was asked for."""


def is_name(text: object) -> bool:
    """Whether a text has the form of a name, "package.module:NAME" or "file.py:NAME"."""
    return isinstance(text, str) and _FORM.fullmatch(text) is not None


def resolve(name: str, *, expected: type | None = None) -> Any:
    """What a name stands for.

    Args:
        name: "package.module:NAME", where the current folder is searched, too, after everything else, or "file.py:NAME". NAME
            may have dots: an attribute of an attribute.
        expected: A class that the object must be an instance or a subclass of.

    Raises:
        NamingError: (a ValueError) if the name has another form, there is no such module or file, it raises while it is
            imported, it has no such attribute, or the attribute is something else than `expected`.
    """
    form = _FORM.fullmatch(name) if isinstance(name, str) else None
    if form is None:
        raise NamingError(f"a name has the form package.module:NAME or file.py:NAME, got {name!r}")
    place, path = form["place"], form["attribute"].split(".")
    found: Any = _from_file(place, name) if place.endswith(".py") else _module(place, name)
    for depth, attribute in enumerate(path):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            known = [entry for entry in dir(found) if not entry.startswith("_")]
            near = difflib.get_close_matches(attribute, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known[:12]) or 'nothing public'}"
            owner = ":".join([place, ".".join(path[:depth])]) if depth else place
            raise NamingError(f"{name!r}: {owner} has no {attribute!r}{hint}") from error
    fits = expected is None or isinstance(found, expected) or (isinstance(found, type) and issubclass(found, expected))
    if not fits:
        assert expected is not None
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise NamingError(
            f"{name!r} is {what}, and a {expected.__module__}.{expected.__qualname__} (a subclass, or an object of it) is needed"
        )
    return found


def name_of(kind: type) -> str:
    """The name that `resolve` finds a class by: in another process, too, unless it is local to a function or a notebook."""
    module = sys.modules.get(kind.__module__)
    place = str(module.__file__) if module is not None and is_from_file(kind) else kind.__module__
    return f"{place}:{kind.__qualname__}"


def is_from_file(kind: type) -> bool:
    """Whether a class was found by "file.py:NAME", so that no other process could import it by its module."""
    return kind.__module__.startswith(_OF_FILE)


def _module(place: str, name: str) -> ModuleType:
    here = os.getcwd()
    try:
        return _imported(place, name)
    except NamingError:
        # The console script does not look where it is started, `python -m` does.
        if here in sys.path or "" in sys.path or not _might_be_here(place):
            raise
    sys.path.append(here)
    importlib.invalidate_caches()
    return _imported(place, name)


def _might_be_here(place: str) -> bool:
    top = Path(place.partition(".")[0])
    return top.is_dir() or top.with_suffix(".py").is_file()


def _imported(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise NamingError(
                f"{name!r}: there is no module {error.name!r} on Python's path or in {os.getcwd()}; a file is named with its "
                f"suffix, file.py:NAME"
            ) from error
        raise _raised(place, name, error) from error
    except Exception as error:  # whatever a module of somebody else does
        raise _raised(place, name, error) from error


def _from_file(place: str, name: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise NamingError(f"{name!r}: there is no file {path}")
    # One module for one file, however often it is named.
    module_name = f"{_OF_FILE}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _raised(str(path), name, error) from error
    return module


def _raised(place: str, name: str, error: Exception) -> NamingError:
    return NamingError(f"{name!r}: {place} cannot be imported, since it raises {type(error).__name__}: {error}")
