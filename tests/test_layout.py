"""Which part of the package may know which."""

import ast
from pathlib import Path

import pytest

import hf_selfjudge


ROOT = Path(hf_selfjudge.__file__).parent
# No folder imports from one behind it.
ORDER = (
    "utils", "models", "data", "forward", "judge", "decoding", "scoring", "mining", "training", "bench", "hub",
    "serving", "demo", "cli",
)  # fmt: skip
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name in ORDER)


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in it the import stands."""
    found, folder = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) + 1 - node.level]
            module = ".".join([*base, *filter(None, [node.module])])
            names = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            known = {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            found |= known or {module}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "hf_selfjudge" for name in names), f"{path}: import relatively"
    return found


def test_every_folder_is_known():
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == {*ORDER}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards(path):
    here = ORDER.index(path.parent.name)
    for module in imported(path):
        assert module.partition(".")[0] in ORDER[: here + 1], f"imports {module}"


def test_there_is_no_circle():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in MODULES}
    done, under_way = set(), []

    def visit(module: str) -> None:
        assert module not in under_way, " -> ".join([*under_way, module])
        if module in done or module not in graph:
            return
        under_way.append(module)
        for other in sorted(graph[module]):
            visit(other)
        under_way.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            first = node.body[1] if has_docstring and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, node.name
