"""Names of outside objects: found in modules and files, and every way of failing says which it was."""

import collections
import sys

import pytest

from coupfast.naming import NamingError, is_name, name_of, resolve


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder that is no package's, and the current one."""
    (tmp_path / "things_outside.py").write_text("class Thing:\n    class Inner:\n        pass\n\nthing = Thing()\nnumber = 3\n")
    (tmp_path / "broken_outside.py").write_text("raise KeyError('no such thing')\n")
    (tmp_path / "needy_outside.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("things_outside", "broken_outside", "needy_outside"):
        sys.modules.pop(name, None)


def test_modules_and_files(outside):
    assert resolve("collections:OrderedDict") is collections.OrderedDict
    thing = resolve("things_outside:Thing")  # the current folder, as python -m has it
    assert resolve("things_outside:Thing.Inner") is thing.Inner
    from_file = resolve("things_outside.py:Thing")
    assert from_file is resolve(f"{outside}/things_outside.py:Thing") is not thing  # one module for one file
    assert resolve(name_of(from_file)) is from_file and resolve(name_of(thing)) is thing
    assert name_of(from_file) == f"{outside}/things_outside.py:Thing"


def test_expected(outside):
    kind = resolve("things_outside:Thing")
    assert resolve("things_outside:Thing", expected=kind) is kind
    assert isinstance(resolve("things_outside:thing", expected=kind), kind)
    with pytest.raises(NamingError, match=r"'things_outside:number' is of type int, and a things_outside.Thing \(a subclass"):
        resolve("things_outside:number", expected=kind)
    with pytest.raises(NamingError, match="'things_outside:Thing' is the class Thing, and a builtins.int"):
        resolve("things_outside:Thing", expected=int)


@pytest.mark.parametrize(
    "name, message",
    [
        ("things_outside", "has the form package.module:NAME or file.py:NAME, got 'things_outside'"),
        ("things_outside:", "has the form"),
        ("things_outside:3", "has the form"),
        ("no_such_module_here:a", "there is no module 'no_such_module_here' on Python's path or in "),
        ("collections.nothing:a", "there is no module 'collections.nothing'"),
        ("nothing.py:a", "there is no file .*nothing.py"),
        ("things_outside:Thang", "things_outside has no 'Thang'; did you mean 'Thing'?"),
        ("things_outside:Thing.Other", "things_outside:Thing has no 'Other'; it has Inner"),
        ("broken_outside:a", "broken_outside cannot be imported, since it raises KeyError: 'no such thing'"),
        ("broken_outside.py:a", "broken_outside.py cannot be imported, since it raises KeyError: 'no such thing'"),
        ("needy_outside:a", "needy_outside cannot be imported, since it raises ModuleNotFoundError: .*a_package_that"),
    ],
)
def test_says_what_is_wrong(outside, name, message):
    with pytest.raises(NamingError, match=message):
        resolve(name)


def test_a_file_that_raised_is_tried_again(outside):
    with pytest.raises(NamingError):
        resolve("broken_outside.py:a")
    (outside / "broken_outside.py").write_text("a = 1\n")
    assert resolve("broken_outside.py:a") == 1


def test_is_name():
    assert is_name("a.b:C") and is_name("./x y/file.py:build") and not is_name("autoattack-rand") and not is_name(None)
