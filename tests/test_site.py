"""The site's API pages name what is public, all of it and nothing else. Links and markup are held by `make docs`."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import qempo_fast as qf

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"\.\. (currentmodule|autofunction|autoclass|py:data):: ([\w.]+)")


def documented() -> dict[str, set[str]]:
    """Names on the API pages, by module."""
    found: dict[str, set[str]] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        module = ""
        for kind, name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if kind == "currentmodule":
                module = name
            else:
                found.setdefault(module, set()).add(name)
    return found


DOCUMENTED = documented()


def own(module: str) -> set[str]:
    """Public functions and classes that a module without __all__ defines."""
    members = vars(importlib.import_module(module)).items()
    kinds = (inspect.isfunction, inspect.isclass)
    return {n for n, x in members if n[0] != "_" and any(k(x) for k in kinds) and x.__module__ == module}


def listed(package: str) -> set[str]:
    """__all__ of a package, read and not imported: trl takes ten seconds."""
    source = (ROOT / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def test_every_public_name_is_on_an_api_page() -> None:
    rooms = {name for name in qf.__all__ if inspect.ismodule(getattr(qf, name))}
    assert rooms == {"metrics", "reference"}
    assert DOCUMENTED["qempo_fast"] == set(qf.__all__) - rooms


@pytest.mark.parametrize(
    "package", [f"qempo_fast.{name}" for name in ("metrics", "integrations.trl", "integrations.hf")]
)
def test_every_name_of_a_package_is_on_its_api_page(package: str) -> None:
    assert DOCUMENTED[package] == listed(package)


@pytest.mark.parametrize(
    "module",
    [f"qempo_fast.{name}" for name in ("packing", "distributed", "integrations.openrlhf")],
)
def test_every_function_of_a_module_is_on_its_api_page(module: str) -> None:
    assert DOCUMENTED[module] == own(module) - set(qf.__all__)


def test_every_reference_is_on_its_api_page() -> None:
    # The results are the public types themselves, which stand on the pages of the public functions.
    shared = {name for name in qf.reference.__all__ if inspect.isclass(getattr(qf.reference, name))}
    assert all(getattr(qf, name) is getattr(qf.reference, name) for name in shared)
    assert DOCUMENTED["qempo_fast.reference"] == set(qf.reference.__all__) - shared


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda p: p.stem)
def test_an_api_page_opens_with_what_it_is_good_for(page: Path) -> None:
    title, blank, first = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert first.startswith("After this page you can ")


def test_no_other_module_has_a_page() -> None:
    modules = (
        "packing",
        "distributed",
        "metrics",
        "reference",
        *(f"integrations.{n}" for n in ("hf", "openrlhf", "trl")),
    )
    assert set(DOCUMENTED) == {"qempo_fast", *(f"qempo_fast.{name}" for name in modules)}
