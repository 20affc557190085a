"""Imports point one way, and what is the reference here is never part of what is tested."""

import ast
from graphlib import TopologicalSorter

from tests.goldens import REPO


def imported(file) -> set[str]:
    """Dotted names that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_cycles_and_no_torch():
    files = {
        ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (REPO / "jflow").rglob("*.py")
    }
    assert len(files) > 50
    graph = {name: imported(file) for name, file in files.items()}
    for name, modules in graph.items():
        assert not {m.split(".")[0] for m in modules} & {"torch", "diffusers", "configs"}, name
    # Raises CycleError with the modules of one.
    TopologicalSorter({name: graph[name] & files.keys() - {name} for name in graph}).prepare()
