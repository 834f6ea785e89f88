"""Every Python block of the loss pages and of the README runs as it is printed, and every link in them has a target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import qempo_fast as qf

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "losses").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """(page, line, source) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(page.name, text.count("\n", 0, m.start()) + 2, m.group(1)) for m in BLOCK.finditer(text)]


def run(page: str, line: int, source: str, **given: object) -> None:
    # Blank lines in front: a traceback then names the line of the page.
    exec(compile("\n" * (line - 1) + source, page, "exec"), dict(given))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_every_loss_has_its_page() -> None:
    named = " ".join(page.read_text(encoding="utf-8").splitlines()[0] for page in PAGES)
    losses = [name for name in qf.__all__ if name.endswith("_loss")]
    assert len(losses) >= 15
    assert [name for name in losses if f"`{name}`" not in named] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_what_each_has(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("**For** ", "Status: ", "**Defaults", "**Traps**", "```python", f"(../images/losses/{page.stem}.png)"):
        assert part in text, part
    assert re.search(r"\*\*(paper|derived)", text)
    assert (page.parent / f"../images/losses/{page.stem}.png").is_file()


@pytest.mark.parametrize(
    ("page", "line", "source"), [pytest.param(*b, id=f"{b[0]}:{b[1]}") for page in PAGES for b in blocks(page)]
)
def test_blocks_of_the_loss_pages(page: str, line: int, source: str) -> None:
    assert "assert" in source
    run(page, line, source)


def test_blocks_of_the_readme() -> None:
    sequences, tokens, width, vocabulary = 16, 3, 8, 20
    generator = torch.Generator().manual_seed(0)
    n = sequences * tokens
    given = {
        "torch": torch,
        "hidden": torch.randn(n, width, generator=generator, requires_grad=True),
        "ref_hidden": torch.randn(n, width, generator=generator),
        "head": torch.randn(vocabulary, width, generator=generator),
        "ref_head": torch.randn(vocabulary, width, generator=generator),
        "targets": torch.randint(vocabulary, (n,), generator=generator),
        "cu_seqlens": torch.arange(sequences + 1) * tokens,
        "rewards": torch.rand(sequences, generator=generator),
        "embeddings": torch.randn(sequences, 5, generator=generator),
    }
    found = blocks(ROOT / "README.md")
    assert found
    for block in found:
        run(*block, **given)
    assert given["hidden"].grad is not None


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "docs" / "losses.md", ROOT / "docs" / "reproduce.md"], ids=lambda p: p.stem
)
def test_links_have_targets(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def test_a_wrong_block_fails() -> None:
    with pytest.raises(AssertionError):
        run("page.md", 7, "assert 1 == 2")
