"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib

import pytest
from test_architecture import ROOT, sources

import graphpar
from graphpar.errors import GraphparError

MODULES = sorted(
    ".".join(("graphpar", *path.relative_to(ROOT).with_suffix("").parts)).replace(
        "graphpar.graphpar", "graphpar"
    )
    for _, path in sources()
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    loaded = importlib.import_module(module)
    assert any(test.examples for test in doctest.DocTestFinder().find(loaded)), "none of them is found"
    assert doctest.testmod(loaded).failed == 0


@pytest.mark.parametrize("name", graphpar.__all__)
def test_public_names_have_an_example(name: str) -> None:
    public = getattr(graphpar, name)
    if not (isinstance(public, type) and issubclass(public, GraphparError)):
        assert ">>> " in public.__doc__
