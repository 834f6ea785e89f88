"""The pages of docs/ and the README: their Python runs as printed, their links and paths exist, and they open alike."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qempo_fast as qf

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted((DOCS / "losses").glob("*.md"))
# docs/api is made from docstrings, docs/benchmarks from results: tests/test_site.py and tests/test_bench.py hold them.
ALL = [p for p in sorted(DOCS.rglob("*.md")) if p.parent.name not in ("api", "benchmarks")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPENING = "After this page you "
# Non-empty lines of the README in front of its reference tables: one screen and a half, 1,640 px at GitHub's width.
HEAD_LINES = 52


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """(page, line, source) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(page.name, text.count("\n", 0, m.start()) + 2, m.group(1)) for m in BLOCK.finditer(text)]


def run(page: str, line: int, source: str, **given: object) -> dict[str, Any]:
    # Blank lines in front: a traceback then names the line of the page.
    space: dict[str, Any] = dict(given)
    exec(compile("\n" * (line - 1) + source, page, "exec"), space)
    return space


def run_page(page: Path, **given: object) -> dict[str, Any]:
    """Run a page's blocks one after another, as a reader would in one session."""
    found = blocks(page)
    assert found
    for block in found:
        given = run(*block, **given)
    return given


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


# ---- the pages of the losses


def test_every_loss_has_its_page() -> None:
    named = " ".join(page.read_text(encoding="utf-8").splitlines()[0] for page in PAGES)
    losses = [n for n in qf.__all__ if n.endswith("_loss")]
    assert len(losses) >= 15
    assert [n for n in losses if f"`{n}`" not in named] == []


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


# ---- Python of the other pages


def test_blocks_of_the_readme() -> None:
    sequences, tokens, width, vocabulary = 16, 3, 8, 20
    generator = torch.Generator().manual_seed(0)
    n = sequences * tokens
    given = {
        "hidden": torch.randn(n, width, generator=generator, requires_grad=True),
        "ref_hidden": torch.randn(n, width, generator=generator),
        "head": torch.randn(vocabulary, width, generator=generator),
        "ref_head": torch.randn(vocabulary, width, generator=generator),
        "targets": torch.randint(vocabulary, (n,), generator=generator),
        "cu_seqlens": torch.arange(sequences + 1) * tokens,
        "rewards": torch.rand(sequences, generator=generator),
    }
    space = run_page(README, **given)
    assert given["hidden"].grad is not None
    # Under its floor lam stays at the ceiling where it started.
    assert float(space["constraint"].lam) == pytest.approx(space["ceiling"])


@pytest.mark.parametrize(
    "page",
    [DOCS / f"{n}.md" for n in ("linear_logps", "support", "weighted_logps", "dpp", "science")],
    ids=lambda p: p.stem,
)
def test_blocks_that_need_nothing(page: Path) -> None:
    assert any("assert" in source for *_, source in blocks(page))
    run_page(page)


def test_blocks_of_metrics() -> None:
    pytest.importorskip("sacrebleu")
    run_page(DOCS / "metrics.md")


def test_blocks_of_losses() -> None:
    space = run_page(DOCS / "losses.md")
    assert space["nats"] == pytest.approx(64.8, abs=0.1)  # what the page and the demo call 65 nats
    assert space["quality"](2.0) < 0.9


def test_blocks_of_packing() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    reference = copy.deepcopy(model).requires_grad_(False)
    space = run_page(
        DOCS / "packing.md",
        model=model,
        reference=reference,
        prompts=[[1, 2, 3], [4, 5]],
        pairs=[[[6, 7], [8, 9, 10]], [[11], [12, 13]]],
        completions=[[[6 + i, 7] for i in range(8)], [[8, 9 + i] for i in range(8)]],
        ref_logps=torch.zeros(16),
        rewards=torch.arange(16.0),
    )
    assert space["logps"].shape == (4,)
    assert torch.equal(space["logps"].detach(), space["ref"])  # the policy is still the reference
    # The diagram: 8 tokens are fed, h2 predicts both first tokens, and d stands where a does.
    a, b, c, d, e, f, g = range(1, 8)
    p = qf.packing.pack_prompts([[20, 20, 20]], [[[a, b, c], [d, e, f, g]]])
    assert p.input_ids.tolist() == [[20, 20, 20, a, b, d, e, f]]
    assert p.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert list(zip(p.targets.tolist(), p.source.tolist(), strict=True)) == [
        *((a, 2), (b, 3), (c, 4)),
        *((d, 2), (e, 5), (f, 6), (g, 7)),
    ]
    assert p.separate_tokens == 11


def test_blocks_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import trl_models
    from trl.trainer import utils

    before = utils._ChunkedLogProbFunction
    path = trl_models.new_model(tmp_path / "model")
    batch = {"max_steps": 1, "per_device_train_batch_size": 4}
    given: dict[str, Any] = {
        "dpo_config": trl_models.dpo_config(tmp_path, **batch),
        "grpo_config": trl_models.grpo_config(tmp_path, **batch),
        "pairs": trl_models.pairs(),
        "prompts": trl_models.prompts(),
        "groups": trl_models.stored_groups(),
        "tokenizer": trl_models.tokenizer(),
        "reward": trl_models.word_reward,
        "embed": trl_models.word_counts,
    }
    try:
        for block in blocks(DOCS / "integrations" / "trl.md"):
            given = run(*block, **{**given, "model": trl_models.load(path)})
            if "trainer" in given:
                assert given.pop("trainer").state.global_step == 1
    finally:
        utils._ChunkedLogProbFunction = before


@pytest.mark.parametrize(
    ("outer", "own", "tau"),
    [
        (None, {}, None),
        ("auto", {}, None),
        ("sampled", {}, "chosen"),
        ("sampled", {"fused": False}, "chosen"),
        ("sampled", {"grad": "exact"}, None),
        ("exact", {"tau": 2**-5}, 2**-5),
        (None, {"grad": "sampled"}, "chosen"),
    ],
)
def test_the_trl_page_tells_which_gradient_a_trainer_takes(
    outer: str | None, own: dict[str, Any], tau: float | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under bf16: its own grad and tau, and at their defaults what was in TRL's seam."""
    pytest.importorskip("trl")
    import trl_models

    from qempo_fast.integrations.trl import GroupTrainer, use_fused_logps

    plain, seen = qf.weighted_logps, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if torch.is_grad_enabled():
            stats = qf.last_stats()
            seen.append((args[1].dtype, stats.tau if stats.error is None else "chosen"))
        return out

    monkeypatch.setattr(qf, "weighted_logps", watched)
    config = trl_models.grpo_config(tmp_path, max_steps=1, bf16=True)
    with use_fused_logps(grad=outer) if outer else contextlib.nullcontext():
        GroupTrainer(
            trl_models.load(trl_models.new_model(tmp_path / "model")),
            trl_models.word_reward,
            config,
            train_dataset=trl_models.prompts(),
            processing_class=trl_models.tokenizer(),
            loss="spl",
            loss_kwargs={"alpha": 0.1, "beta": 0.1},
            **own,
        ).train()
    assert set(seen) == {(torch.bfloat16, tau)}


def test_the_trl_page_names_every_setting_that_raises() -> None:
    pytest.importorskip("trl")
    from qempo_fast.integrations.trl import group, preference

    text = (DOCS / "integrations" / "trl.md").read_text(encoding="utf-8")
    assert [n for n in (*group._UNUSED, *preference._UNUSED) if f"`{n}`" not in text] == []


def test_a_wrong_block_fails() -> None:
    with pytest.raises(AssertionError):
        run("page.md", 7, "assert 1 == 2")


# ---- what pages say about the code


def calls(page: Path, function: str) -> Iterator[ast.Call]:
    """Calls of function, or of qf.function, in a page's Python."""
    for _, _, source in blocks(page):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function:
                yield node


@pytest.mark.parametrize("page", [README, DOCS / "losses.md", DOCS / "integrations" / "trl.md"], ids=lambda p: p.stem)
def test_one_constraint_is_recommended(page: Path) -> None:
    found = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls(page, "QualityConstraint")]
    assert found
    for given in found:
        mu = float(given.pop("mu", "0"))
        assert float(given.pop("min_reward")) < 1
        assert given == {"lam": "ceiling", "lam_max": "ceiling", "lr": "1.0", "step": "'multiplicative'"}
        assert ("\nceiling = 2 * nats" in page.read_text(encoding="utf-8")) == (mu == 1)


@pytest.mark.parametrize("function", [qf.linear_logps, qf.sequence_logps], ids=lambda f: f.__name__)
def test_printed_signatures_are_the_functions(function: Any) -> None:
    text = (DOCS / "linear_logps.md").read_text(encoding="utf-8")
    match = re.search(rf"^{function.__name__}\((.*?)\)(?:$|    #)", text, re.MULTILINE | re.DOTALL)
    assert match
    printed = inspect.signature(run("page", 1, f"def f({match.group(1)}): pass")["f"])
    wanted = inspect.signature(function)
    assert [(p.name, p.kind, p.default) for p in printed.parameters.values()] == [
        (p.name, p.kind, p.default) for p in wanted.parameters.values()
    ]


# ---- how pages look


@pytest.mark.parametrize("page", [README, *ALL], ids=name)
def test_links_have_targets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), link


@pytest.mark.parametrize("page", [README, *ALL], ids=name)
def test_paths_exist(page: Path) -> None:
    """Paths in backquotes, as globs; NAME stands for what a reader puts there, docs/source is TRL's."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(
        r"`(?:python (?:-P )?)?((?:bench|csrc|docs(?!/source)|examples|kernels|qempo_fast|tests)/[-\w./*]*)[^`]*`", text
    )
    missing = [p for p in found if not list(ROOT.glob(p.replace("NAME", "*").rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("page", ALL, ids=name)
def test_a_page_opens_with_what_it_is_good_for(page: Path) -> None:
    title, blank, first = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert first.startswith("**For** " if page in PAGES else OPENING)


def test_the_readme_begins_with_one_screen_and_a_half() -> None:
    head, tables = README.read_text(encoding="utf-8").split("\n## Reference\n")
    assert sum(1 for line in head.splitlines() if line.strip()) <= HEAD_LINES
    assert len(re.findall(r"!\[|<img ", head)) == 1
    for part in ("make demo", "make test", "<!-- bench:readme -->", "**No GPU kernel of this version has run"):
        assert part in head
    assert "| method | functions |" in tables


@pytest.mark.parametrize("page", [README, *ALL], ids=name)
def test_python_fits_the_line(page: Path) -> None:
    assert [line for *_, source in blocks(page) for line in source.splitlines() if len(line) > 120] == []
