"""The plan of the house: which room may import which, what imports there are, and the picture of both.

    python -P docs/draw_architecture.py        # writes docs/images/architecture.svg

tests/test_architecture.py holds the plan, and that the picture is the one drawn here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# A room may import what stands in a row below its own. With each room its place in the picture, 0 to 1, chosen so
# that few lines pass behind boxes.
LAYERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("use it all", {"tests": 0.2, "bench": 0.5, "examples": 0.8}),
    ("command line", {"cli": 0.12, "reproduce": 0.32, "demo": 0.52}),
    ("in others' trainers", {"integrations": 0.8}),
    ("the hall", {"constraint": 0.09, "qempo_fast": 0.34, "distributed": 0.56, "packing": 0.75, "metrics": 0.91}),
    ("losses", {"losses": 0.34}),
    ("ops", {"dpp": 0.2, "logps": 0.5}),
    ("table of ops", {"_backends": 0.34, "_operator": 0.64}),
    ("what runs", {"reference": 0.1, "kernels": 0.28, "_collective": 0.64}),
    ("the door", {"_door": 0.46}),
    ("checks", {"_check": 0.82}),
    ("native code", {"_C": 0.28}),
)
# And, in its own row, only these.
SIDEWAYS = {
    *(("cli", "reproduce"), ("cli", "demo"), ("reproduce", "demo")),
    *(("qempo_fast", room) for room in ("constraint", "distributed", "packing", "metrics")),
    # An address is taken at one place, whoever launches.
    ("kernels", "_door"),
}
# These import nothing of ours: a kernel or a reference can be read, copied and tested alone.
ALONE = ("reference", "kernels", "_C")

ROW = {room: row for row, (_, rooms) in enumerate(LAYERS) for room in rooms}


class Arrow(NamedTuple):
    """One import: a module of ours, the module of ours that it imports, and where."""

    source: str
    target: str
    place: str


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every Python file of the repository by the name of its module; bench's and tests' with their folder in front."""
    found = {}
    for folder in ("qempo_fast", "kernels", "bench", "tests", "examples"):
        package = "qempo_fast.kernels" if folder == "kernels" else folder
        for path in sorted([*(root / folder).rglob("*.py"), *(root / folder).rglob("*.pyi")]):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def room(module: str) -> str:
    """The room of a module: its folder, or its file where that stands in the hall."""
    top, _, rest = module.partition(".")
    if top != "qempo_fast" or not rest:
        return top
    first = rest.split(".")[0]
    return "cli" if first == "__main__" else first


def _named(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Absolute names that an import asks for, a `from` import's with the name that it takes out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    up = module.split(".")
    base = up[: len(up) - node.level + is_package] if node.level else []
    source = ".".join([*base, *(node.module.split(".") if node.module else [])])
    return [f"{source}.{alias.name}" for alias in node.names]


def _ours(name: str, module: str, known: dict[str, Path]) -> str | None:
    """The module of ours that holds a name. bench/ and tests/ are on the path of what runs in them."""
    if name.split(".")[0] in sys.stdlib_module_names:
        return None
    folders = [""] if module.startswith("qempo_fast") else ["", module.split(".")[0], module.rpartition(".")[0]]
    for folder in folders:
        parts = [*folder.split("."), *name.split(".")] if folder else name.split(".")
        depth = len(folder.split(".")) if folder else 0
        for end in range(len(parts), depth, -1):
            if (found := ".".join(parts[:end])) in known:
                return found
    return None


def arrows(root: Path = ROOT) -> Iterator[Arrow]:
    """Every import of ours by ours, those inside functions and under TYPE_CHECKING too."""
    known = modules(root)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            targets = {_ours(name, module, known) for name in _named(node, module, path.stem == "__init__")}
            for target in sorted(t for t in targets if t is not None and t != module):
                yield Arrow(module, target, f"{path.relative_to(root)}:{node.lineno}")


def between_rooms(found: list[Arrow]) -> set[tuple[str, str]]:
    """The pairs of rooms of which one imports the other."""
    pairs = {(room(arrow.source), room(arrow.target)) for arrow in found}
    return {(a, b) for a, b in pairs if a != b}


def direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no chain of others stands for. An arrow of a circle stands for nothing less, and stays."""

    def reaches(start: str, end: str, without: tuple[str, str]) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            here = waiting.pop()
            if here == end:
                return True
            seen.add(here)
            waiting += [b for a, b in pairs if a == here and b not in seen and (a, b) != without]
        return False

    return {pair for pair in pairs if not reaches(*pair, without=pair)}


_WIDTH, _MARGIN, _ROW, _BOX = 960, 130, 82, 34
_SHOWN = {"_C": "_C (csrc)", "_backends": "_backends.OPS"}
_HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_ROW * len(LAYERS)}" role="img">
<title>Rooms of qempo_fast and what they import</title>
<style>
text {{ font: 13px sans-serif; fill: #1f2933; text-anchor: middle }}
.row {{ font-size: 12px; fill: #66727f; text-anchor: start }}
.box {{ fill: #eef3f8; stroke: #7b8794 }}
.band {{ fill: #f7f9fb }}
.arrow {{ fill: none; stroke: #334e68; stroke-width: 1.4; marker-end: url(#head) }}
.implied {{ fill: none; stroke: #cbd5de; stroke-width: 0.8 }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#334e68"/></marker></defs>
<rect width="100%" height="100%" fill="#ffffff"/>"""


class Box(NamedTuple):
    """A room's box: its centre and its width."""

    x: float
    y: float
    width: float


def _boxes() -> dict[str, Box]:
    found = {}
    for row, (_, rooms) in enumerate(LAYERS):
        for name, place in rooms.items():
            x = _MARGIN + (_WIDTH - _MARGIN) * place
            found[name] = Box(round(x), round((row + 0.5) * _ROW), 26 + 8 * len(_SHOWN.get(name, name)))
    return found


def _line(kind: str, start: Box, end: Box) -> str:
    half = _BOX // 2
    if start.y == end.y:  # round the boxes between, under the row
        path = f"M{start.x:.0f} {start.y + half:.0f}Q{(start.x + end.x) / 2:.0f} {start.y + half + 34:.0f}"
        aside = 12 if end.x > start.x else -12
        return f'<path class="{kind}" d="{path} {end.x - aside:.0f} {end.y + half:.0f}"/>'
    side = half if end.y > start.y else -half
    top, bottom = start.y + side, end.y - side
    middle = (top + bottom) / 2
    curve = f"C{start.x:.0f} {middle:.0f} {end.x:.0f} {middle:.0f} {end.x:.0f} {bottom:.0f}"
    return f'<path class="{kind}" d="M{start.x:.0f} {top:.0f}{curve}"/>'


def picture(found: list[Arrow]) -> str:
    """The rooms as boxes in their rows, the arrows that are there, those that follow from others thin and grey."""
    boxes = _boxes()
    pairs = between_rooms(found)
    strong = direct(pairs)
    lines = [_HEAD]
    for row, (label, _) in enumerate(LAYERS):
        lines.append(f'<rect class="band" x="0" y="{row * _ROW + 8}" width="{_WIDTH}" height="{_ROW - 16}"/>')
        lines.append(f'<text class="row" x="10" y="{row * _ROW + _ROW / 2 + 4:.0f}">{label}</text>')
    lines += [_line("implied", boxes[a], boxes[b]) for a, b in sorted(pairs - strong)]
    lines += [_line("arrow", boxes[a], boxes[b]) for a, b in sorted(strong)]
    for name, box in boxes.items():
        left, top = box.x - box.width / 2, box.y - _BOX / 2
        size = f'width="{box.width:.0f}" height="{_BOX}" rx="5"'
        lines.append(f'<rect class="box" x="{left:.0f}" y="{top:.0f}" {size}/>')
        lines.append(f'<text x="{box.x:.0f}" y="{box.y + 4:.0f}">{_SHOWN.get(name, name)}</text>')
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture(list(arrows())), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
