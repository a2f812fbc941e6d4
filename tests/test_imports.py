"""Allowed imports between packages, checked in the source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tree import circles, import_graph, sources

ROOT = Path(__file__).resolve().parent.parent
OURS = {"stages", "dualkl", "cache", "tests", "bench", "examples"}
FORBIDDEN = {
    "stages": OURS - {"stages", "dualkl", "cache"},
    "dualkl": OURS - {"dualkl"}
    | {"transformers", "datasets", "peft", "pyarrow", "deepspeed", "accelerate", "yaml"},
    "cache": OURS - {"cache"} | {"torch", "transformers", "datasets", "peft", "deepspeed", "accelerate"},
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages imported anywhere in a file, even in functions; relative imports count as own."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_imports_only_what_its_layer_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) & FORBIDDEN[package]) for path in files
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import os.path\ndef f():\n    from torch.nn import Linear\n    import cache.reader as r\n"
    )
    assert imported_packages(path) == {"os", "torch", "cache"}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(import_graph(ROOT, sources())) == []


def test_circles_are_found_through_functions_and_relative_imports_but_not_through_types(
    tmp_path: Path,
) -> None:
    files = {
        "one/__init__.py": "",
        "one/a.py": "def f():\n    from one import b\n",
        "one/b.py": "from .inner.c import name\n",
        "one/inner/__init__.py": "",
        "one/inner/c.py": "from .. import a as other\nimport one.d\n",
        "one/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from one.a import f\n",
        "one/e.py": "import one.d, one.f\n",
        "one/f.py": "import one.e\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path, sources(tmp_path, ("one",)))
    assert circles(graph) == [("one.a", "one.b", "one.inner.c"), ("one.e", "one.f")]


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("cache", ["torch", "transformers", "dualkl", "stages"]),
        ("dualkl", ["transformers", "pyarrow", "cache", "stages"]),
        ("stages.view", ["torch", "transformers", "datasets", "accelerate"]),
        ("stages.report", ["torch", "transformers", "datasets", "accelerate"]),
    ],
)
def test_importing_a_package_loads_nothing_that_it_may_not_know(package: str, absent: list[str]) -> None:
    code = f"import sys, {package}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cache_is_imported_in_half_a_second_of_processor_time() -> None:
    code = "import time; start = time.process_time(); import cache; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_the_page_of_a_run_is_made_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    configuration = (ROOT / "pipeline.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(configuration)
    code = (
        "import sys; from stages import report, view; from pathlib import Path;"
        "source = view.source('run'); report.write_report(Path('run'), source.config, str);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
