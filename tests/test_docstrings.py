"""Every public name has an example in its docstring, and it runs."""

import doctest
import io

import pytest

import coupfast


@pytest.mark.parametrize("name", coupfast.__all__)
def test_its_example_runs(name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(coupfast, name), name, globs={})
    assert found.examples, f"coupfast.{name} has no example in its docstring"
    output = io.StringIO()
    failed, _ = doctest.DocTestRunner().run(found, out=output.write)
    assert not failed, output.getvalue()
