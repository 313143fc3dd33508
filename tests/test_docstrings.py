"""Every public name, which is what the page of the API has, has an example in its docstring, and it runs."""

import doctest
import inspect
import io
import pkgutil
import re
from pathlib import Path

import pytest

import coupfast
from coupfast.models import registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "api.md"
NAMES = re.findall(r"auto(?:function|class):: (\S+)", PAGE.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs(name, monkeypatch):
    # What an example registers is known to it alone. (Looking a name up imports the package's own.)
    assert registry.find_known("score", "cifar10-tiny") and registry.find_known("classifier", "cifar10-tiny")
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    monkeypatch.setattr(registry, "_names", list(registry._names))
    module, _, last = name.rpartition(".")
    (found,) = doctest.DocTestFinder(recurse=False).find(pkgutil.resolve_name(f"{module}:{last}"), name, globs={})
    assert found.examples, f"{name} has no example in its docstring"
    output = io.StringIO()
    failed, _ = doctest.DocTestRunner().run(found, out=output.write)
    assert not failed, output.getvalue()


FUNCTIONS = [name for name in NAMES if inspect.isfunction(pkgutil.resolve_name(":".join(name.rsplit(".", 1))))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_tells_what_it_takes_and_gives(name):
    """Every parameter by its name, before the example, and what is returned, if anything is."""
    function = pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    text = inspect.getdoc(function).partition("Example:")[0]
    signature = inspect.signature(function)
    assert [word for word in signature.parameters if not re.search(rf"\b{word}\b", text)] == []
    assert "Returns:" in text or signature.return_annotation in (None, "None")


CHECKING = [
    name for name in set(NAMES) - set(FUNCTIONS) if "__post_init__" in vars(pkgutil.resolve_name(":".join(name.rsplit(".", 1))))
]


@pytest.mark.parametrize("name", sorted(CHECKING))
def test_a_class_that_checks_its_fields_tells_what_it_raises(name):
    found = pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    assert "Raises:" in inspect.cleandoc(found.__doc__).partition("Example:")[0]


def test_the_page_has_every_name():
    assert {f"coupfast.{name}" for name in coupfast.__all__} - set(NAMES) == set()
