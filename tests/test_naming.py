"""Names of outside objects: found in modules and files, and every way of failing says which it was."""

import collections
import sys

import pytest

from coupfast.naming import is_from_file, is_reference, reference_to, resolve


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
    assert is_from_file(from_file) and not is_from_file(thing)
    assert resolve(reference_to(from_file)) is from_file and resolve(reference_to(thing)) is thing
    assert reference_to(from_file) == f"{outside}/things_outside.py:Thing"


def test_a_file_finds_the_modules_beside_it(outside, tmp_path_factory, monkeypatch):
    """As `python FILE` does, wherever the command runs, and after what is installed."""
    (outside / "from_beside_outside.py").write_text("import json\nfrom things_outside import number\n")
    (outside / "json.py").write_text("raise KeyError('the library has one')\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert resolve(f"{outside}/from_beside_outside.py:number") == 3
    with pytest.raises(ValueError, match="'a_package_that_is_not_there'$"):
        resolve(f"{outside}/needy_outside.py:a")


def test_expected(outside):
    kind = resolve("things_outside:Thing")
    assert resolve("things_outside:Thing", kind) is kind
    assert isinstance(resolve("things_outside:thing", (int, kind)), kind)
    with pytest.raises(ValueError, match="`attack`='things_outside:number' is a int, and a things_outside.Thing is wanted"):
        resolve("things_outside:number", kind, option="attack")
    with pytest.raises(ValueError, match="is a type, and a builtins.int or builtins.str is wanted"):
        resolve("things_outside:Thing", (int, str))


@pytest.mark.parametrize(
    "name, message",
    [
        ("things_outside", "`name` names an object as package.module:NAME or file.py:NAME, got 'things_outside'"),
        ("things_outside:", "names an object as"),
        ("things_outside:3", "names an object as"),
        (
            "no_such_module_here:a",
            "importing no_such_module_here gives ModuleNotFoundError: .* has to be on sys.path",
        ),
        ("collections.nothing:a", "importing collections.nothing gives ModuleNotFoundError"),
        ("nothing.py:a", "there is no file .*nothing.py"),
        ("things_outside:Thang", "things_outside has no 'Thang'; it has Thing, number, thing"),
        ("things_outside:Thing.Other", "things_outside has no 'Other'; it has Inner"),
        ("broken_outside:a", "importing broken_outside gives KeyError: 'no such thing'"),
        ("broken_outside.py:a", "importing broken_outside.py gives KeyError: 'no such thing'"),
        (
            "needy_outside:a",
            "importing needy_outside gives ModuleNotFoundError: .*'a_package_that_is_not_there'$",
        ),
    ],
)
def test_says_what_is_wrong(outside, name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_a_file_that_raised_is_tried_again(outside):
    with pytest.raises(ValueError, match="KeyError"):
        resolve("broken_outside.py:a")
    (outside / "broken_outside.py").write_text("a = 1\n")
    assert resolve("broken_outside.py:a") == 1


def test_forms():
    assert is_reference("a.b:C") and is_reference("./x y/file.py:build") and is_reference("a:b.c")
    assert not any(map(is_reference, ("autoattack-rand", ":a", "a:", "a b:c", "file.py:3", None)))
