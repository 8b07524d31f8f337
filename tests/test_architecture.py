"""The one law of imports, read from the sources: every package may import what stands before it, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shapleycam"

#: From the bottom to the top. What stands in one row does not import one another, except within a folder of its own.
LAW = (
    ("errors", "_version"),
    ("optional",),
    ("ops", "data"),
    ("utilities",),
    ("model",),
    ("derivatives",),
    ("methods",),
    ("plan",),
    ("program",),
    ("explanation",),
    ("explainer",),
    ("smoothing", "shapley", "evaluate", "attribute", "profiling", "compat", "export", "serve"),  # the uses
    ("cli",),
)
#: Public names of modules that moved; they re-export, and nothing here imports them.
NAMES = {"images": "data", "models": "model", "objectives": "utilities", "metrics": "evaluate"}

LEVEL = {name: level for level, names in enumerate(LAW) for name in names}


def imported(file: Path) -> list[tuple[int, str]]:
    """(line, dotted name below the package) of every import of the package's own modules; "" is the package itself."""
    package = ["shapleycam", *file.relative_to(SOURCE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [".".join([*base, *filter(None, [node.module])])]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name == "shapleycam" and isinstance(node, ast.ImportFrom):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif name.startswith("shapleycam."):
                found.append((node.lineno, name.removeprefix("shapleycam.")))
    return found


def breaches(file: Path) -> list[str]:
    place = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    allowed = LEVEL[NAMES.get(place, place)]
    wrong = []
    for line, name in imported(file):
        other = name.split(".")[0]
        if other in (place, "_native", "kernels") or (place in NAMES and other == NAMES[place]):
            continue
        if other not in LEVEL or LEVEL[other] >= allowed:
            wrong.append(f"{file.relative_to(SOURCE)}:{line} imports {name}")
    return wrong


def test_imports_point_down() -> None:
    files = [file for file in sorted(SOURCE.rglob("*.py")) if file.relative_to(SOURCE) != Path("__init__.py")]
    assert len(files) > 50
    assert [breach for file in files for breach in breaches(file)] == []


def test_every_module_has_its_place() -> None:
    places = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert places - set(LEVEL) - set(NAMES) - {"__init__", "kernels"} == set()


@pytest.mark.parametrize("text", ["from ..explainer import Explainer", "from .. import explainer", "import shapleycam.cli"])
def test_a_breach_is_seen(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "head.py"
    file.write_text(f"def late():\n    {text}\n")
    assert len(breaches(file)) == 1
