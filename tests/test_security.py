"""No code comes from data, and nothing listens beyond loopback."""

import ast
from functools import cache

import yaml
from test_architecture import ROOT

from graphpar import cluster_spec

FOLDERS = ("graphpar", "passes", "cost_models", "examples", "benchmarks")
FROM_OUR_OWN_PIPES = {"graphpar/runtime/worker.py", "graphpar/runtime/user_ops.py"}
"""Where cloudpickle reads what the driver sent over a private pipe to a worker that it started."""
GROUPS = {"graphpar/runtime/transport.py", "graphpar/runtime/torchrun.py"}
"""Where processes meet: those of a local job on loopback, those of torchrun where it says."""
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "_UniqueKeyLoader"}


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every call and every import in the sources, with its file; found when first asked for."""
    return [
        (str(path.relative_to(ROOT)), node)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)
    ]


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call: the file, what is called as it is written, the call."""
    return [(name, ast.unparse(node.func), node) for name, node in nodes() if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str:
    """What a keyword argument is given, as it is written; empty where it is not."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def test_no_code_comes_from_files() -> None:
    modules = {"pickle", "marshal", "shelve", "dill", "joblib"}
    imported = [
        name
        for name, node in nodes()
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if {alias.name, getattr(node, "module", None)} & modules
    ]
    assert imported == []
    assert {name for name, called, _ in calls() if called in ("eval", "exec", "os.system")} == set()
    assert {name for name, called, _ in calls() if called == "cloudpickle.loads"} == FROM_OUR_OWN_PIPES
    assert [
        n for n, called, c in calls() if called == "torch.load" and keyword(c, "weights_only") != "True"
    ] == []
    assert [n for n, _, call in calls() if keyword(call, "allow_pickle") == "True"] == []
    assert [n for n, _, call in calls() if keyword(call, "shell") == "True"] == []


def test_yaml_is_plain_data() -> None:
    loads = [
        call for _, called, call in calls() if called.startswith("yaml.") and "load" in called.lower()
    ]
    assert loads
    for call in loads:
        given = [ast.unparse(a) for a in call.args[1:]] + [keyword(call, "Loader")]
        assert ast.unparse(call.func) == "yaml.safe_load" or SAFE_LOADERS & set(given)
    assert issubclass(cluster_spec._UniqueKeyLoader, yaml.SafeLoader)


def test_sockets_are_bound_to_loopback() -> None:
    package = [(name, call) for name, called, call in calls() if called.endswith("init_process_group")]
    assert {name for name, _ in package if not name.startswith("benchmarks/")} == GROUPS
    bound = [
        call.args[0]
        for _, called, call in calls()
        if called.endswith(".bind") and call.args and isinstance(call.args[0], ast.Tuple)
    ]
    assert bound
    assert {ast.unparse(address.elts[0]) for address in bound} == {"'127.0.0.1'"}
