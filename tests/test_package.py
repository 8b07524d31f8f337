"""The package as a whole: its names, when they are imported, and its one version."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shapleycam

ROOT = Path(__file__).parents[1]
TREE = ast.parse(Path(shapleycam.__file__).read_text(encoding="utf-8"))


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_type_checkers_see_the_names_that_there_are() -> None:
    block = next(node for node in TREE.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == shapleycam._HOMES
    assert sorted(shapleycam.__all__) == sorted([*seen, "__version__"])
    for name, home in shapleycam._HOMES.items():
        module = sys.modules[f"shapleycam.{home}"] if getattr(shapleycam, name) is not None else None
        assert getattr(module, name) is getattr(shapleycam, name)
    assert {*shapleycam.__all__, *shapleycam._MODULES} <= set(dir(shapleycam))


def test_the_package_comes_without_torch_until_it_is_needed() -> None:
    code = """
import sys, shapleycam
assert not {"torch", "numpy"} & set(sys.modules)
shapleycam.InputError, shapleycam.ShapleyCamWarning, dir(shapleycam)
assert not {"torch", "numpy"} & set(sys.modules)
from shapleycam import *
assert Explainer is shapleycam.explainer.Explainer and backends is shapleycam.ops.backends
assert not hasattr(shapleycam, "nonsense")
try:
    from shapleycam import Explainr
except ImportError as error:
    print(error)
"""
    assert "cannot import name 'Explainr'" in python(code)


@pytest.mark.slow
def test_submodules_are_attributes() -> None:
    # In an order in which none is there because of one before it.
    asked = ", ".join(f"shapleycam.{module}.__name__" for module in ("errors", "ops", *shapleycam._MODULES))
    assert python(f"import shapleycam; print({asked})").split()[2:] == [f"shapleycam.{m}" for m in shapleycam._MODULES]


def test_names_survive_pickling() -> None:
    for name in ("Explainer", "Layout", "InputError", "backends"):
        thing = getattr(shapleycam, name)
        assert pickle.loads(pickle.dumps(thing)) is thing is copy.deepcopy(thing)


@pytest.mark.slow
def test_type_checkers_tell_users_of_misspelt_names(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file, settings = tmp_path / "user.py", tmp_path / "mypy.ini"
    source = Path(shapleycam.__file__).parents[1]  # a checker does not see through an editable install
    settings.write_text(
        f"[mypy]\nmypy_path = {source}\nfollow_imports = silent\n"
        "[mypy-torch.*]\nfollow_imports = skip\n"  # torch takes a minute
    )
    file.write_text("import shapleycam\nreveal_type(shapleycam.Layout('NCHW', (7, 7)))\nshapleycam.Layuot\n")
    out, errors, _ = api.run(["--no-incremental", "--cache-dir", str(tmp_path), "--config-file", str(settings), str(file)])
    assert 'Revealed type is "shapleycam.model.layouts.Layout"' in out, out + errors
    assert 'Module has no attribute "Layuot"' in out


def test_the_version_is_written_once() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in settings["project"] and settings["project"]["dynamic"] == ["version"]
    # The builds read it with the least of parsers: setuptools a literal, CMake three numbers.
    text = (ROOT / "src" / "shapleycam" / "_version.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', text, re.MULTILINE) == [shapleycam.__version__]
    assert not re.search(r"project\(shapleycam VERSION \d", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
