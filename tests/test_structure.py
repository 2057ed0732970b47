"""The shape of the source tree: which room may import which, and what may stand where."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from persistent import Persistent

import postoffice

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "postoffice"

# A room is a module of postoffice, or a folder with all that is in it.  A room may import those of
# its own line and of the lines above it.
LAYERS = (
    ("exceptions", "interfaces", "display", "health"),
    ("expressions", "charsets", "postfix", "workers"),
    ("encoded_words", "addresses", "parameters"),
    ("headers", "mime"),
    ("message",),
    ("filters", "loops", "bounces", "fingerprints"),
    ("routing",),
    ("depot",),
    (
        *("claims", "database_uri", "relational", "zeo_client", "description", "outbound"),
        *("packing", "storage_socket"),
    ),
    ("database",),
    ("taking", "claimed", "storage_server"),
    ("histories",),
    ("queue", "config"),
    ("__init__",),
    ("consumer", "delivery"),
    ("intake",),
    ("api",),
    ("daemon",),
    ("cli", "__main__", "demo"),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

# Of the rooms open to them, these may import no others.
NARROWED = {
    "depot": {"exceptions", "interfaces", "message"},
    "queue": {
        *(
            "display",
            "exceptions",
            "interfaces",
            "addresses",
            "message",
            "bounces",
            "fingerprints",
            "loops",
        ),
        *("depot", "claimed", "claims", "database", "description", "histories", "outbound"),
        "taking",
    },
    "claims": {"depot"},
    "database": {
        *("display", "exceptions", "database_uri", "relational", "storage_socket", "zeo_client"),
    },
    "storage_socket": {"display", "exceptions"},
    "relational": {"display", "exceptions"},
    "postfix": {"display", "exceptions"},
    "zeo_client": set(),
    "workers": {"display", "exceptions"},
}

# These take values and return values: nothing of them touches the database.
PURE = {
    *("expressions", "charsets", "encoded_words", "addresses", "parameters", "headers", "mime"),
    *("message", "filters", "loops", "bounces", "routing"),
}
DATABASE = {"BTrees", "ZEO", "ZODB", "persistent", "relstorage", "transaction", "zodburi"}


def _modules() -> dict[str, Path]:
    """Return the file of each module, by its dotted name below postoffice."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    return module.partition(".")[0]


def _rank(room: str) -> int:
    return RANK.get(room, len(LAYERS))


class _WithoutTypes(ast.NodeTransformer):
    """Leaves out what only a type checker imports: a name in a signature is no dependency."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def _imported_names(module: str, path: Path) -> Iterator[str]:
    """Yield the full dotted name of whatever a module imports, wherever in it."""
    package = ["postoffice", *module.split(".")]
    if path.name != "__init__.py" or module == "__init__":
        package.pop()
    tree = _WithoutTypes().visit(ast.parse(path.read_bytes(), str(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            if node.module:
                base = [*base, node.module]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _own_imports(module: str, path: Path) -> Iterator[str]:
    """Yield the modules of postoffice that a module imports, as MODULES names them."""
    for name in _imported_names(module, path):
        top, _, below = name.partition(".")
        if top != "postoffice":
            continue
        # The last part may be a name within the module, not a module.
        while "." in below and below not in MODULES:
            below = below.rpartition(".")[0]
        yield below if below in MODULES or below in RANK else "__init__"


def test_every_module_has_its_place() -> None:
    """Each module of postoffice belongs to a room that the table of layers names."""
    strangers = sorted({_room(module) for module in MODULES} - RANK.keys())
    assert not strangers, f"add {strangers} to LAYERS in {Path(__file__).name}, where they belong"


def test_imports_go_one_way() -> None:
    """No module imports from a room of a later layer, or from one that is closed to it."""
    wrong = []
    for module, path in MODULES.items():
        room = _room(module)
        for imported in _own_imports(module, path):
            target = _room(imported)
            allowed = _rank(target) <= _rank(room)
            if room in NARROWED and target != room:
                allowed = target in NARROWED[room]
            if not allowed:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle() -> None:
    """No module imports itself by way of others, within a room or a layer either."""
    graph = {
        module: {imported for imported in _own_imports(module, path) if imported != module}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_pure_rooms_know_no_database() -> None:
    """The rooms that decide and compose import nothing of ZODB or of transactions."""
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if _room(module) in PURE
        for name in _imported_names(module, path)
        if name.partition(".")[0] in DATABASE
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_room_for_odds_and_ends() -> None:
    """No module is called utils: what it would hold has a noun of its own."""
    assert not [module for module in MODULES if module.rpartition(".")[2] in ("util", "utils")]


def _descendants(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)


def test_persistent_classes_live_in_the_depot() -> None:
    """Every class whose instances the database stores is defined under postoffice/depot."""
    for found in pkgutil.walk_packages(postoffice.__path__, "postoffice."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    outside = [
        f"{cls.__module__}.{cls.__qualname__}"
        for cls in _descendants(Persistent)
        if cls.__module__.startswith("postoffice.")
        and not cls.__module__.startswith("postoffice.depot.")
    ]
    assert not outside


def test_every_test_says_what_it_expects() -> None:
    """Each test has a docstring: the expected behaviour, in a sentence that ends in a full stop."""
    wrong = [
        f"{path.name}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_bytes(), str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not (ast.get_docstring(node) or "").endswith(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_sample_configuration_is_one_file() -> None:
    """The sample that the wheel carries and the one under etc read the same."""
    packaged = PACKAGE / "data" / "postoffice.ini.sample"
    assert (ROOT / "etc" / "postoffice.ini.sample").read_bytes() == packaged.read_bytes()


SKIPS = """
import pytest

def test_skipped():
    pytest.skip("no such server")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False
"""
SKIPS_ALL = "import pytest; pytest.importorskip('no_such_module_anywhere')"


@pytest.mark.parametrize(
    ("ci", "status", "said"),
    [
        ("", 0, ["2 skipped, 1 xfailed", "no such server", "no_such_module_anywhere"]),
        ("true", 1, ["no such server", "no_such_module_anywhere", "CI does not allow"]),
    ],
)
def test_nothing_is_skipped_in_ci(tmp_path: Path, ci: str, status: int, said: list[str]) -> None:
    """A skipped test or module says why, and is a failure where CI is set."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text(SKIPS)
    (tmp_path / "test_all.py").write_text(SKIPS_ALL)
    options = ["-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-n", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env=os.environ | {"CI": ci, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stdout
    assert [text for text in said if text not in run.stdout] == []


def test_filters_are_found_by_their_names() -> None:
    """Each filter of the configuration file is an entry point, so others can add theirs."""
    names = {
        "to_hostname",
        "header_regexp",
        "header_regexp_file",
        "body_regexp",
        "body_regexp_file",
        "envelope_to",
    }
    assert names <= entry_points(group="postoffice.filters").names
