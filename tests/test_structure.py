"""The structure of the package: imports go one way, and private names stay in their file."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dall3

PACKAGE = Path(dall3.__file__).parent
FILES = {
    ".".join(("dall3", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# dall3/__init__.py and weights/__init__.py import their public names lazily; `python -m` starts the command.
LAZY = {"dall3", "dall3.weights", "dall3.training.__main__"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(module: str, deferred: bool = True) -> set[str]:
    """The modules of dall3 that a module imports; with `deferred` those that its functions import too."""
    nodes = ast.walk(tree(module)) if deferred else tree(module).body
    for_types = {
        inner
        for node in ast.walk(tree(module))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in nodes:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (submodules & FILES.keys()) or {node.module}
    return {name for name in found if name in FILES and name != module}


def test_imports_have_no_cycle():
    graph = {module: imported(module) - LAZY for module in FILES if module not in LAZY}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("importing", "imported_by_none"),
    [
        ("dall3.models", ("dall3.weights", "dall3.tokens", "dall3.diffusion", "dall3.text", "dall3.pipeline")),
        ("dall3.weights", ("dall3.tokens", "dall3.diffusion", "dall3.pipeline", "dall3.generate", "dall3.request")),
        ("dall3.tokens", ("dall3.weights", "dall3.pipeline", "dall3.generate", "dall3.request", "dall3.parts")),
        ("dall3.diffusion", ("dall3.weights", "dall3.pipeline", "dall3.generate", "dall3.request", "dall3.parts")),
        ("dall3.generate", ("dall3.pipeline", "dall3.weights.find", "dall3.weights.folder")),
        ("dall3.request", ("dall3.pipeline", "dall3.generate")),
        ("dall3.parts", ("dall3.pipeline", "dall3.generate", "dall3.request")),
    ],
)
def test_lower_layers_do_not_import_higher_ones(importing, imported_by_none):
    for module in FILES:
        if (module == importing or module.startswith(f"{importing}.")) and module not in LAZY:
            wrong = {name for name in imported(module) if name.startswith(imported_by_none)}
            assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", FILES)
def test_private_names_stay_in_their_file(module):
    defined = {node.name for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)
    }
    own = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute) and is_self(node.value)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dall3"):
            private = {alias.name for alias in node.names if is_private(alias.name)}
            assert not private, f"line {node.lineno} imports {private}"
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            known = node.attr in defined | own or root(node) not in LOCAL_OBJECTS
            assert known, f"line {node.lineno} uses {ast.unparse(node)}"


LOCAL_OBJECTS = {"pipe", "pipeline", "parts", "request", "transformer", "output", "out"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
