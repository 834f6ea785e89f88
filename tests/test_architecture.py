"""The plan of the house is the house: imports go one way, rooms have their doors, the table of ops keeps its promises.

The plan stands in docs/draw_architecture.py; docs/architecture.md explains it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qempo_fast
from qempo_fast._backends import OPS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("logps", "dpp", "losses")
DOORS = ("op", "cpu", "triton", "cuda", "reference")


def load_plan() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qempo_draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAN = load_plan()
ARROWS = list(PLAN.arrows())


def wrong(arrows: list) -> list[str]:
    """One line for each import that the plan does not have: where, what, and what to do."""
    lines = []
    for arrow in arrows:
        source, target = PLAN.room(arrow.source), PLAN.room(arrow.target)
        what = f"{arrow.place}: {arrow.source} imports {arrow.target}"
        if missing := [room for room in (source, target) if room not in PLAN.ROW]:
            lines.append(f"{what}: give {missing[0]} a row in LAYERS of docs/draw_architecture.py")
        elif source == target or (source, target) in PLAN.SIDEWAYS:
            continue
        elif source in PLAN.ALONE:
            lines.append(f"{what}: {source} imports nothing of ours; take the value as an argument")
        elif PLAN.ROW[source] >= PLAN.ROW[target]:
            lines.append(
                f"{what}: {target} is {'above' if PLAN.ROW[target] < PLAN.ROW[source] else 'beside'} {source}; move "
                "what both need to a row below, or take it as an argument (LAYERS in docs/draw_architecture.py)"
            )
    return lines


def circles(arrows: list) -> list[str]:
    """One line for each pair of files that reach each other, with the import that leaves the first of them."""
    targets: dict[str, set[str]] = {}
    for arrow in arrows:
        targets.setdefault(arrow.source, set()).add(arrow.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(targets.get(start, ()))
        while waiting:
            here = waiting.pop()
            if here not in seen:
                seen.add(here)
                waiting += targets.get(here, ())
        return seen

    reach = {module: reached(module) for module in targets}
    return [
        f"{arrow.place}: {arrow.source} imports {arrow.target}, which leads back to it; "
        "move what both need to a third file"
        for arrow in arrows
        if arrow.source in reach.get(arrow.target, ())
    ]


def toy(tmp_path: Path, files: dict[str, str]) -> list:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(PLAN.arrows(tmp_path))


def test_every_kind_of_import_is_seen(tmp_path: Path) -> None:
    found = toy(
        tmp_path,
        {
            "qempo_fast/__init__.py": "from .losses import spl_loss\n__version__ = '0'\n",
            "qempo_fast/_check.py": "",
            "qempo_fast/losses/__init__.py": "from .groups import spl_loss\n",
            "qempo_fast/losses/groups.py": "import math, torch\nfrom .. import _check, __version__\nfrom . import op\n",
            "qempo_fast/losses/op.py": "def f():\n    from ..kernels import a\n",
            "kernels/__init__.py": "",
            "kernels/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import qempo_fast.losses.op\n",
            "tests/cases.py": "",
            "tests/test_a.py": "from cases import x\nimport qempo_fast as qf\n",
            "bench/suite/run.py": "from suite.rows import x\n",
            "bench/suite/rows.py": "",
        },
    )
    seen = {(arrow.source, arrow.target): arrow.place for arrow in found}
    assert seen == {
        ("qempo_fast", "qempo_fast.losses"): "qempo_fast/__init__.py:1",
        ("qempo_fast.losses", "qempo_fast.losses.groups"): "qempo_fast/losses/__init__.py:1",
        ("qempo_fast.losses.groups", "qempo_fast"): "qempo_fast/losses/groups.py:2",
        ("qempo_fast.losses.groups", "qempo_fast._check"): "qempo_fast/losses/groups.py:2",
        ("qempo_fast.losses.groups", "qempo_fast.losses.op"): "qempo_fast/losses/groups.py:3",
        ("qempo_fast.losses.op", "qempo_fast.kernels.a"): "qempo_fast/losses/op.py:2",
        ("qempo_fast.kernels.a", "qempo_fast.losses.op"): "kernels/a.py:3",
        ("tests.test_a", "tests.cases"): "tests/test_a.py:1",
        ("tests.test_a", "qempo_fast"): "tests/test_a.py:2",
        ("bench.suite.run", "bench.suite.rows"): "bench/suite/run.py:1",
    }
    # The import of __version__ from the hall, and the kernel's of a room above it, are the two that go up.
    assert [line.split(": ")[0] for line in wrong(found)] == ["qempo_fast/losses/groups.py:2", "kernels/a.py:3"]
    assert {line.split(":")[0] for line in circles(found)} == {
        *("qempo_fast/__init__.py", "qempo_fast/losses/__init__.py", "qempo_fast/losses/groups.py"),
        *("qempo_fast/losses/op.py", "kernels/a.py"),
    }


def test_a_wrong_import_is_named_with_its_line_and_a_way_out(tmp_path: Path) -> None:
    files = {
        "kernels/dpp.py": "from qempo_fast import _check\n",
        "qempo_fast/_check.py": "",
        "qempo_fast/dpp/gains.py": "\nfrom ..losses import op\n",
        "qempo_fast/logps/op.py": "from ..dpp import gains\n",
        "qempo_fast/losses/op.py": "from ..parlour import x\n",
        "qempo_fast/parlour.py": "x = 1\n",
    }
    above, beside, new, alone = wrong(toy(tmp_path, files))
    assert above.startswith(
        "qempo_fast/dpp/gains.py:2: qempo_fast.dpp.gains imports qempo_fast.losses.op: losses is above"
    )
    assert "dpp is beside logps; move what both need to a row below" in beside
    assert new.endswith("imports qempo_fast.parlour: give parlour a row in LAYERS of docs/draw_architecture.py")
    assert alone.startswith("kernels/dpp.py:1: ")
    assert alone.endswith("take the value as an argument")


def test_imports_go_down_only() -> None:
    faults = wrong(ARROWS)
    assert not faults, "\n".join(faults)


def test_no_files_import_each_other() -> None:
    faults = circles(ARROWS)
    assert not faults, "\n".join(faults)


def test_every_room_of_the_plan_is_there() -> None:
    assert set(PLAN.ROW) - {PLAN.room(module) for module in PLAN.modules()} == set()


def statements(path: Path) -> list[ast.stmt]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return body[1:] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body


def defined(path: Path) -> set[str]:
    """Names that a file makes or takes in, at its top level."""
    names: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def doors_of(room: str) -> set[str]:
    """op.py for torch.library, and a file for each backend that the table names for an op of the room."""
    ops = [op for op in OPS.values() if op.room == room]
    own_reference = {"reference"} if any(op.reference is None for op in ops) else set()
    return {"op", *own_reference, *(backend for op in ops for backend in op.backends)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_doors_and_no_others(room: str) -> None:
    stems = {path.stem for path in (ROOT / "qempo_fast" / room).glob("*.py")}
    assert {"op", "cpu", "triton"} <= doors_of(room)
    assert stems & set(DOORS) == doors_of(room), f"{room}: doors by name are op.py and a file for each backend in OPS"


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_entrance_only_hands_on(room: str) -> None:
    entrance = ROOT / "qempo_fast" / room / "__init__.py"
    *imports, names = statements(entrance)
    for node in imports:
        assert isinstance(node, ast.ImportFrom), f"{entrance}:{node.lineno}: wanted an import, or __all__ at the end"
        assert not (node.module or "").startswith("_"), f"{entrance}:{node.lineno}: public names come from plain files"
    assert isinstance(names, ast.Assign)
    assert ast.unparse(names.targets[0]) == "__all__"
    assert sorted(ast.literal_eval(names.value)) == sorted(alias.name for node in imports for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_plain_file_of_a_room_is_a_door_or_holds_a_public_function(room: str) -> None:
    public = set(importlib.import_module(f"qempo_fast.{room}").__all__)
    for path in (ROOT / "qempo_fast" / room).glob("[!_]*.py"):
        assert path.stem in DOORS or defined(path) & public, f"{path}: nothing public: call it _{path.name}"


def test_the_table_names_every_room() -> None:
    assert {op.room for op in OPS.values()} == set(ROOMS)


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, backend, id=f"{op}-{backend}")
        for op, row in OPS.items()
        for backend in (*row.backends, "reference")
    ],
)
def test_every_op_has_the_function_that_the_table_promises(op: str, backend: str) -> None:
    row = OPS[op]
    if backend == "reference" and row.reference is not None:
        assert callable(row.reference)
        return
    path = ROOT / "qempo_fast" / row.room / f"{backend}.py"
    assert op in defined(path), f"OPS promises {op} on {backend}: write {op} in {path.relative_to(ROOT)}"
    assert callable(getattr(importlib.import_module(f"qempo_fast.{row.room}.{backend}"), op))


@pytest.mark.parametrize("room", ROOMS)
def test_every_door_of_a_backend_serves_an_op(room: str) -> None:
    for backend in doors_of(room) - {"op"}:
        ops = [name for name, op in OPS.items() if op.room == room and backend in (*op.backends, "reference")]
        assert defined(ROOT / "qempo_fast" / room / f"{backend}.py") & set(ops)


# A stand-in for the package, so that its __init__ does not import the rooms before the table has been looked at.
_TABLE_ALONE = """
import importlib, sys, types
package = types.ModuleType("qempo_fast")
package.__path__ = [sys.argv[1]]
sys.modules["qempo_fast"] = package
table = importlib.import_module("qempo_fast._backends")
print([name for name in sys.modules if name.startswith(("qempo_fast.logps", "qempo_fast.dpp", "qempo_fast.losses"))])
before = repr(table.OPS), str(table.backends())
for module in sys.argv[2:]:
    importlib.import_module(module)
print((repr(table.OPS), str(table.backends())) == before)
"""


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_the_table_of_ops_needs_no_room_and_no_import_changes_it(order: str) -> None:
    rooms = [m for m in PLAN.modules() if m.split(".")[:1] == ["qempo_fast"] and PLAN.room(m) in (*ROOMS, "kernels")]
    assert len(rooms) > 40
    modules = rooms if order == "forward" else rooms[::-1]
    command = [sys.executable, "-c", _TABLE_ALONE, str(Path(qempo_fast.__file__).parent), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Calls that importing a file makes: all but those in the bodies of its functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*child.decorator_list, child.args):
                yield from calls_at_import(ast.Module([ast.Expr(part)], []) if isinstance(part, ast.expr) else part)
        elif not isinstance(child, ast.Lambda):
            yield from calls_at_import(child)


def registrations(source: str) -> list[int]:
    """Lines on which importing a file calls a function of _backends or changes its table."""
    tree = ast.parse(source)
    taken = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "_backends"
        for alias in node.names
    }
    functions = "|".join([r"_backends\.\w+", *sorted(taken)])
    wanted = re.compile(rf"{functions}|(_backends\.)?OPS\.(update|setdefault|pop|popitem|clear)")
    return [call.lineno for call in calls_at_import(tree) if wanted.fullmatch(ast.unparse(call.func))]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("from . import _backends\n_backends.register('a')\ndef f():\n    _backends.choose('a')\n", [2]),
        ("from ._backends import register as r, OPS\n@r('a')\ndef f(): pass\nOPS.update(a=1)\n", [2, 4]),
        ("from ._backends import OPS\nNAMES = [op for op, row in OPS.items()]\n", []),
    ],
)
def test_a_registration_is_seen(source: str, lines: list[int]) -> None:
    assert registrations(source) == lines


def test_nothing_registers_by_being_imported() -> None:
    for path in PLAN.modules().values():
        if path.is_relative_to(ROOT / "qempo_fast") and path.name != "_backends.py":
            lines = registrations(path.read_text(encoding="utf-8"))
            assert lines == [], f"{path.relative_to(ROOT)}:{lines[:1]}: name the op in OPS of _backends.py instead"


def test_the_picture_is_the_one_that_the_script_draws() -> None:
    drawn = PLAN.PICTURE.read_text(encoding="utf-8")
    assert drawn == PLAN.picture(ARROWS), "imports have changed: python -P docs/draw_architecture.py"
    assert len(drawn.splitlines()) < 300


def test_every_file_that_the_plan_page_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:qempo_fast|kernels|csrc|bench|tests|docs|examples)/[\w./]*)`", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
