"""Statistics of the source tree.

`python -m tests.support.tree` prints lines per package, config keys, import circles, long functions and long
lines.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cache", "dualkl", "stages", "bench", "tests", "examples")
LONGEST_FUNCTION, LONGEST_LINE = 40, 110


def sources(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Python files of the packages, relative to `root`."""
    return sorted(path.relative_to(root) for package in packages for path in (root / package).rglob("*.py"))


def import_graph(root: Path, files: list[Path]) -> dict[str, set[str]]:
    """Modules of `files` that each file imports, including inside functions but not under TYPE_CHECKING."""
    modules = {_module(path): path for path in files}
    return {
        name: {target for target in _targets(root / path, name, modules) if target != name}
        for name, path in modules.items()
    }


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Sorted groups of modules that import each other, directly or indirectly."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(groups)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines, without the docstring, of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = node.body[1:] if ast.get_docstring(node) is not None else []
            documented = own[0].lineno - node.body[0].lineno if own else 0
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1 - documented


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def _targets(path: Path, name: str, modules: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                target = f"{base}.{alias.name}"  # a module, or a name in it
                yield from [each for each in (target, base) if each in modules][:1]


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _runtime_nodes(child)


def _config_keys() -> int:
    sections = yaml.safe_load((ROOT / "pipeline.yaml").read_text())
    return sum(len(section) for section in sections.values())


def _folders(files: list[Path], lines: dict[Path, list[str]]) -> Iterator[str]:
    counts: Counter[str] = Counter()
    for path in files:
        inner = path.parts[1] if path.parts[0] == "stages" and len(path.parts) > 2 else ""
        counts[path.parts[0]] += len(lines[path])
        if inner:
            counts[f"  stages/{inner}"] += len(lines[path])
    yield from (f"{counts[name]:>8,}  {name}" for name in sorted(counts, key=str.strip))
    yield f"{sum(counts[name] for name in ('cache', 'dualkl', 'stages')):>8,}  cache + dualkl + stages"


def main() -> None:
    files = sources()
    lines = {path: (ROOT / path).read_text().splitlines() for path in files}
    print("lines", *_folders(files, lines), f"\nconfig keys: {_config_keys()}", sep="\n")
    found = circles(import_graph(ROOT, files))
    print(f"\ncircles: {len(found)}", *(f"  {' <-> '.join(group)}" for group in found), sep="\n")
    long = sorted(
        (-length, f"{path}: {name}")
        for path in files
        for name, length in functions(ROOT / path)
        if length > LONGEST_FUNCTION
    )
    print(
        f"\nfunctions over {LONGEST_FUNCTION} lines: {len(long)}",
        *(f"{-n:>5}  {where}" for n, where in long),
        sep="\n",
    )
    wide = Counter({str(path): sum(len(line) > LONGEST_LINE for line in lines[path]) for path in files})
    print(f"\nlines over {LONGEST_LINE} characters: {wide.total()}", sep="\n")
    print(*(f"{count:>5}  {path}" for path, count in wide.most_common() if count), sep="\n")


if __name__ == "__main__":
    main()
