"""Imports only go down the levels, and importing the package costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import influent

# A module may import from its own level and from those below it.
LEVELS = [
    ["errors", "progress", "ranged", "rng", "storage"],
    ["packing", "baselines", "catalog", "catalog_part", "codec", "damping", "digests", "digits", "examples", "fetch",
     "gradients", "hashing", "compiled", "llvm", "loops", "tiles", "tilequeries", "tilescores", "tilesums", "products",
     "pairproducts", "tileproducts", "pairsides", "pairqueries", "pairtiles", "pairprograms",
     "hub", "kronname", "labels", "loading", "maps", "metrics", "payload", "records", "reduce", "sides", "task",
     "tokenloss", "truncate", "bootstrap", "duplicates", "intervals", "merkle", "payments", "tables",
     "ridge", "lexical", "shardrecord", "sharing"],
    ["artifact", "bind", "coding", "compress", "gram", "kernels", "kronecker", "layers", "layout", "lowrank", "moments",
     "pairs", "programs", "agreement"],
    ["asking", "bases", "budget", "collect", "curvature", "extract", "fisher", "fitting", "kron", "live", "ggn",
     "parameters",
     "passes", "rowstore",
     "rowwriter",
     "truncated", "truth", "rowsums", "checkpoints", "ensemble", "selection", "selective", "whole", "datainf",
     "mixing", "optimizer", "stages", "training"],
    ["appending", "attach", "choosing", "filling", "methods", "indexing", "querying", "recompute", "score", "solving",
     "finetune", "judging", "rerun", "tailpatch", "providers", "settling", "target", "valuing", "contenders", "masking",
     "relevance", "selecting", "distilling", "student", "features", "tuning",
     "slopes", "tangent", "ladder", "appraising", "auditing", "offers",
     "commitments", "untrained", "imitating"],
    ["cli", "demo", "options", "preflight", "report", "terminal", "cli_value", "value_page", "cli_evaluate",
     "evaluating", "plots", "scorecard", "trial", "cli_mask", "explainer"],
    ["__main__"],
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# What is imported only when it is called for, against the order of the table.
LAZY = {("cli", "__init__"), ("cli_evaluate", "__init__"), ("cli_mask", "__init__"), ("cli_value", "__init__")}
HEAVY = {"torch", "transformers", "datasets", "pandas", "pyarrow", "numpy", "scipy", "fsspec"}
LIGHT = [
    "choosing",
    "cli",
    "codec",
    "compress",
    "damping",
    "ensemble",
    "errors",
    "fisher",
    "cli_evaluate",
    "evaluating",
    "payments",
    "merkle",
    "intervals",
    "kronname",
    "indexing",
    "methods",
    "options",
    "preflight",
    "progress",
    "selection",
    "artifact",
    "catalog",
    "records",
    "layout",
    "rowstore",
    "rowwriter",
    "shardrecord",
    "storage",
    "terminal",
]
PACKAGE = Path(influent.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module: str, *, at_once: bool) -> set[str]:
    """Modules of the package that `module` imports: anywhere, or only while it is itself imported."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {name for node in _nodes(tree, at_once) for name in _named(node)}


def _nodes(node: ast.AST, at_once: bool):
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if for_types or (at_once and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _nodes(child, at_once)


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[2] or "__init__" for alias in node.names if alias.name.startswith("influent")]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level == 0:
        if module.partition(".")[0] != "influent":
            return []
        module = module.partition(".")[2]
    return [module.split(".")[0]] if module else [alias.name for alias in node.names]


def test_the_table_has_every_module():
    assert sorted(LEVEL) == MODULES
    assert sum(map(len, LEVELS)) == len(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    wrong = {
        name
        for name in imports(module, at_once=False)
        if (module, name) not in LAZY and LEVEL.get(name, len(LEVELS)) > LEVEL[module]
    }
    assert not wrong, f"{module} (level {LEVEL[module]}) imports {wrong}"


def test_the_exceptions_are_still_needed():
    assert {pair for pair in LAZY if pair[1] not in imports(pair[0], at_once=False)} == set()


def test_no_module_needs_itself():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for name in imports(module, at_once=True) - {"__init__"}:
                visit(name, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in LIGHT)])
def test_light_modules_import_nothing_heavy(module):
    code = f"import influent{module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"fsspec", "numpy"} if module in (".catalog", ".rowstore", ".artifact", ".storage", ".records") else set()
    assert set(done.stdout.split()) <= allowed


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("influent.")
        for alias in node.names
    }
    public = {name for name in dir(influent) if not name.startswith("_") and name not in vars(influent)}
    assert seen.keys() >= public >= {"index", "fit", "query", "self_influence", "info", "verify"}
    for name, (module, original) in seen.items():
        assert name == original
        assert getattr(influent, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        influent.nothing  # noqa: B018  # pyright: ignore
