"""Rules of the house (docs/structure.md) that no linter knows: what may appear where, names, sizes, lazy imports.

The sources are parsed, not imported, so a rule holds for every line, whether a test runs it or not. Which package may
import which is checked by import-linter (pyproject.toml).
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from offmoe.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "offmoe"

MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 59
LONG_FUNCTIONS = 3
"""Functions that may be longer than MAX_FUNCTION_LINES."""

HEAVY = ("torch", "transformers", "safetensors", "accelerate", "tokenizers", "huggingface_hub")
OFFLINE = (
    "config",
    "errors",
    "files",
    "io_limits",
    "policy",
    "profile",
    "report",
    "simulate",
    "text",
    "trace",
    "types",
)
"""Modules and packages that run without torch."""

HOT_PATH = ("policy", "transfer", "compute", "runtime")
VAGUE = frozenset(
    ("manager", "helper", "util", "utils", "made", "found", "said", "given", "here", "there", "came", "beside", "left")
)
"""Words that name nothing. The packages of the hot path have no parameter, attribute or function called so."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"), filename=str(SOURCES[module]))


def nodes(*packages: str) -> Iterator[tuple[str, ast.AST]]:
    """(place, node) of every node of all modules, or of those in some packages of offmoe."""
    for module, path in SOURCES.items():
        if not packages or (module.split(".")[1:2] and module.split(".")[1] in packages):
            for node in ast.walk(tree(module)):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def imported_names(node: ast.AST) -> list[str]:
    """Full names that an import statement names; empty for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ""


def docstrings() -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring, those of attributes included."""
    for place, node in nodes():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield place, node.value.value


def functions(*packages: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for place, node in nodes(*packages):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield place, node


def loaded_after(code: str) -> set[str]:
    """Heavy libraries that a fresh Python has loaded after `code`."""
    code += f"\nimport sys\nprint('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


# --- what may appear where


def test_no_import_circles() -> None:
    """Modules, inside a package too; imports in functions and for annotations count."""
    graph: dict[str, set[str]] = {}
    for module in SOURCES:
        names = {name for node in ast.walk(tree(module)) for name in imported_names(node)}
        graph[module] = {name if name in SOURCES else name.rpartition(".")[0] for name in names} & SOURCES.keys()
        graph[module] -= {module, "offmoe"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(reversed(error.args[1])))


def test_devices_are_the_backends_business() -> None:
    """A CPU is a backend, not a mode."""
    offenders = []
    for place, node in nodes():
        if place.startswith(("offmoe/device/cuda.py", "offmoe/compute/kernels/")):
            continue
        names = [*imported_names(node), dotted(node)]
        if any(name.startswith("torch.cuda") or re.search(r"\bdevice\.type$|\.is_cuda$", name) for name in names):
            offenders.append(place)
    assert not offenders


def test_no_environment_variable_is_an_option() -> None:
    banned = {"os.environ", "os.getenv", "os.putenv"}
    places = [place for place, node in nodes() if banned & {*imported_names(node), dotted(node)}]
    # Where the user's cache folder is, the system says in variables of its own.
    assert not [place for place in places if not place.startswith("offmoe/cli/state_file.py")]


def test_no_process_globals() -> None:
    assert not [place for place, node in nodes() if isinstance(node, ast.Global)]


def test_libraries_are_not_patched() -> None:
    offenders = []
    for module in SOURCES:
        names = [name for node in ast.walk(tree(module)) for name in imported_names(node)]
        libraries = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"offmoe"}
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                offenders += [f"{module}:{node.lineno}" for t in targets if dotted(t).partition(".")[0] in libraries]
    assert not offenders


# --- sizes


def test_no_module_is_long() -> None:
    """A longer module is asked whether it holds two subjects."""
    sizes = {module: path.read_text(encoding="utf-8").count("\n") for module, path in SOURCES.items()}
    assert {module: size for module, size in sizes.items() if size > MAX_MODULE_LINES} == {}


def test_functions_are_short() -> None:
    sizes = {f"{place} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for place, node in functions()}
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES}
    assert len(long) <= LONG_FUNCTIONS, long


# --- words


def test_every_module_has_a_docstring() -> None:
    assert not [module for module in SOURCES if tree(module).body and not ast.get_docstring(tree(module))]


def test_no_docstring_begins_with_of() -> None:
    assert not [place for place, text in docstrings() if text.lstrip().startswith("Of ")]


def test_no_loose_ends() -> None:
    loose = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert not [module for module, path in SOURCES.items() if loose.search(path.read_text(encoding="utf-8"))]


def test_docstrings_name_no_document_that_is_not_here() -> None:
    offenders = []
    for module, path in SOURCES.items():
        for name in re.findall(r"[\w/.-]+\.md\b", path.read_text(encoding="utf-8")):
            if not any((folder / name).exists() for folder in (ROOT, ROOT / "docs", path.parent)):
                offenders.append(f"{module}: {name}")
    assert not offenders


def test_one_spelling() -> None:
    """American, but for the three JSON keys that stay as they were published."""
    british = re.compile(r"\b\w*(quantis|initialis|normalis|vectoris|neighbour|behaviour|colour)\w*")
    keys = re.compile(r'"(quantisation|specialisation|favourites)"')
    offenders = []
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".c", ".h", ".html")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if british.search(keys.sub("", line)):
                offenders.append(f"{path.relative_to(ROOT)}:{number}")
    assert not offenders


def test_names_on_the_hot_path_say_something() -> None:
    offenders = []
    for place, function in functions(*HOT_PATH):
        args = function.args
        names = [function.name, *(a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs])]
        offenders += [f"{place} {name}" for name in names if VAGUE & set(name.split("_"))]
    for place, node in nodes(*HOT_PATH):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in VAGUE:
            offenders.append(f"{place} {node.target.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr.lstrip("_") in VAGUE:
            offenders.append(f"{place} {node.attr}")
    assert not offenders


# --- lazy imports and public names


def test_the_offline_half_starts_without_torch() -> None:
    """The import contracts in pyproject.toml say so of every line; this says so of what importing really loads."""
    modules = [module for module in SOURCES if module.startswith(tuple(f"offmoe.{name}" for name in OFFLINE))]
    assert {"offmoe.policy.planner", "offmoe.simulate.replay", "offmoe.trace.trace", "offmoe.config"} <= set(modules)
    assert loaded_after("import " + ", ".join(modules)) == set()


def test_import_offmoe_loads_nothing_heavy() -> None:
    assert loaded_after("import offmoe\nassert offmoe.__all__ and dir(offmoe) and offmoe.__doc__") == set()


def test_config_and_errors_load_nothing_heavy() -> None:
    assert loaded_after("from offmoe import OffloadConfig, CacheStats, OffmoeError") == set()


def test_public_names() -> None:
    import offmoe
    import offmoe.errors

    errors = {
        name
        for name, value in vars(offmoe.errors).items()
        if inspect.isclass(value) and issubclass(value, offmoe.errors.OffmoeError)
    }
    expected = {"from_pretrained", "register_eviction", "OffloadConfig", "CacheStats", *errors}
    assert set(offmoe.__all__) - {"__version__"} == expected
    assert len(offmoe.__all__) == len(set(offmoe.__all__))
    for name in offmoe.__all__:
        assert getattr(offmoe, name) is not None
        assert name in dir(offmoe)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = offmoe.no_such_name


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_starts_without_torch(verb: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "offmoe", *verb, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (verb[0] if verb else "generate") in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "offmoe" in imported
    assert imported & set(HEAVY) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "bench").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_find_each_other_from_anywhere(path: Path) -> None:
    """`checkout`, which makes the checkout importable, is the only neighbor that is imported by its bare name."""
    neighbors = {other.stem for other in path.parent.glob("*.py")} - {"checkout"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not neighbors.intersection(names), f"{path.name}:{getattr(node, 'lineno', 0)}"
