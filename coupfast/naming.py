"""Objects by name: `package.module:NAME`, for what people add without editing this package."""

from __future__ import annotations

import importlib
from typing import Any


def is_reference(name: Any) -> bool:
    """Whether a word is of the form `package.module:NAME`."""
    return isinstance(name, str) and ":" in name and all(part.isidentifier() for part in name.replace(":", ".").split("."))


def resolve(name: str, expected: type | tuple[type, ...] | None = None, *, option: str = "name") -> Any:
    """What `package.module:NAME` names; the module is imported from `sys.path`.

    Args:
        name: A module and an attribute of it.
        expected: What it has to be an instance or a subclass of; None takes anything.
        option: The option that it was given for, for messages.

    Raises:
        ValueError: if the name has another form, the module cannot be imported or has no such attribute, or what it is does
            not fit. The message says which.
    """
    module_name, _, attribute = name.partition(":")
    if not is_reference(name):
        raise ValueError(f"`{option}` names an object as package.module:NAME, got {name!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module may do anything when it is imported
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]:
            hint = "; its folder has to be on sys.path (PYTHONPATH)"
        raise ValueError(f"`{option}`={name!r}: importing {module_name} gives {type(error).__name__}: {error}{hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(word for word in vars(found) if not word.startswith("_"))[:8])
            raise ValueError(f"`{option}`={name!r}: {module_name} has no {part!r}; it has {public or 'nothing public'}")
        found = getattr(found, part)
    if expected is not None:
        fits = isinstance(found, expected) or (isinstance(found, type) and issubclass(found, expected))
        if not fits:
            kinds = expected if isinstance(expected, tuple) else (expected,)
            wanted = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
            raise ValueError(f"`{option}`={name!r} is a {type(found).__name__}, and a {wanted} is wanted")
    return found


def reference_to(found: Any) -> str:
    """`package.module:NAME` of a class or function, as `resolve` takes it."""
    return f"{found.__module__}:{found.__qualname__}"
