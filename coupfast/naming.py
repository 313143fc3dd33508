"""Objects by name: `package.module:NAME` or `file.py:NAME`, for what people add without editing this package."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_OF_FILE = "_coupfast_file_"  # how the names of modules begin that were made from a file


def is_reference(name: Any) -> bool:
    """Whether a word is of the form `package.module:NAME` or `file.py:NAME`."""
    if not isinstance(name, str):
        return False
    place, _, attribute = name.rpartition(":")
    words = attribute if place.endswith(".py") else f"{place}.{attribute}"
    return bool(place) and all(part.isidentifier() for part in words.split("."))


def resolve(name: str, expected: type | tuple[type, ...] | None = None, *, option: str = "name") -> Any:
    """What `package.module:NAME` or `file.py:NAME` names.

    Args:
        name: A module or a file and an attribute of it. A module is looked for in `sys.path` and then in the current folder.
        expected: What it has to be an instance or a subclass of; None takes anything.
        option: The option that it was given for, for messages.

    Raises:
        ValueError: if the name has another form, the module cannot be imported or has no such attribute, or what it is does
            not fit. The message says which.
    """
    if not is_reference(name):
        raise ValueError(f"`{option}` names an object as package.module:NAME or file.py:NAME, got {name!r}")
    place, _, attribute = name.rpartition(":")
    try:
        found: Any = import_place(place)
    except Exception as error:  # a module may do anything when it is imported
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == place.split(".")[0]:
            hint = "; its folder has to be on sys.path (PYTHONPATH) or the current one; a file has its suffix, file.py:NAME"
        raise ValueError(f"`{option}`={name!r}: importing {place} gives {type(error).__name__}: {error}{hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(word for word in vars(found) if not word.startswith("_"))[:8])
            raise ValueError(f"`{option}`={name!r}: {place} has no {part!r}; it has {public or 'nothing public'}")
        found = getattr(found, part)
    if expected is not None:
        fits = isinstance(found, expected) or (isinstance(found, type) and issubclass(found, expected))
        if not fits:
            kinds = expected if isinstance(expected, tuple) else (expected,)
            wanted = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
            raise ValueError(f"`{option}`={name!r} is a {type(found).__name__}, and a {wanted} is wanted")
    return found


def import_place(place: str) -> ModuleType:
    """The module `package.module`, looked for in `sys.path` and then in the current folder, or that of `file.py`, which finds
    the modules beside it; made once.

    Raises:
        FileNotFoundError: if there is no such file. Importing may raise anything besides.
    """
    return _file(place) if place.endswith(".py") else _module(place)


def reference_to(found: Any) -> str:
    """The name of a class or function, as `resolve` takes it."""
    module = sys.modules.get(found.__module__)
    place = str(module.__file__) if module is not None and is_from_file(found) else found.__module__
    return f"{place}:{found.__qualname__}"


def name_of(found: Any, *, option: str) -> str:
    """The same, of something that has to be found again by it.

    Raises:
        ValueError: if no name leads back to it: a lambda, a partial, an object, what was made inside of a function.
    """
    name = described(found)
    if name.startswith("<"):
        raise ValueError(
            f"`{option}` is {name[1:-1]}, and no name leads back to that, which a run's records and other processes need: put "
            f"a function or class of its own into a module or a file"
        )
    return name


def described(found: Any) -> str:
    """The name of a class or function; of what no name leads back to, words in angle brackets that tell it from others."""
    name = getattr(found, "__qualname__", None)
    if isinstance(found, functools.partial):
        values = ", ".join([*map(repr, found.args), *(f"{key}={value!r}" for key, value in found.keywords.items())])
        return f"<a partial of {described(found.func)} with {_ADDRESS.sub('', values)}>"
    if not isinstance(name, str) or not isinstance(getattr(found, "__module__", None), str):
        return f"<an object of {described(type(found))}>"
    if "<" in name:
        code = getattr(found, "__code__", None)
        tag = "" if code is None else f" {hashlib.sha256(repr(code_of(code)).encode()).hexdigest()[:16]}"
        return f"<{reference_to(found).replace('<', '').replace('>', '')}{tag}>"
    module = sys.modules.get(found.__module__)
    # What was typed in (a notebook, a script) is the user's to keep.
    if module is not None and found.__module__ != "__main__":
        there: Any = module
        for part in name.split("."):
            there = getattr(there, part, None)
        if there is not found and there != found:
            return f"<{reference_to(found)}, which is something else there>"
    return reference_to(found)


def code_of(code: CodeType) -> Any:
    """What a function compiles to, without addresses."""
    constants = [code_of(each) if isinstance(each, CodeType) else str(each) for each in code.co_consts]
    return code.co_name, code.co_code, code.co_names, constants


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def is_from_file(found: Any) -> bool:
    """Whether a class or function is of a module that was made from a file, which no other process could import by its name."""
    return str(found.__module__).startswith(_OF_FILE)


def _module(place: str) -> ModuleType:
    top = place.partition(".")[0]
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A console script does not look where it is started; `python -m` does.
        if error.name != top or not _found_in(os.getcwd(), error):
            raise
    return importlib.import_module(place)


def _found_in(folder: str, error: ModuleNotFoundError) -> bool:
    """Whether the missing module lies in a folder that is not on `sys.path`. It then is, after everything else."""
    top = str(error.name).partition(".")[0]
    place = Path(folder, top)
    if folder in sys.path or not (place.is_dir() or place.with_suffix(".py").is_file()):
        return False
    sys.path.append(folder)
    importlib.invalidate_caches()
    return True


def _file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # One module for one file, however often and from where it is named.
    name = f"{_OF_FILE}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # its suffix is .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            # `python FILE` finds the modules beside its file.
            if isinstance(error, ModuleNotFoundError) and _found_in(str(path.parent), error):
                return _file(place)
            raise
    return sys.modules[name]
