"""What a run of the demo leaves behind: a table, two pictures and a JSON of every figure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: the demo also runs where there is no display
import matplotlib.pyplot as plt
from matplotlib import patheffects
from rich import box
from rich.console import Console
from rich.table import Table

from .evaluate import BATCH, Evaluation
from .task import Cities, City
from .train import Step

TITLES = {"base": "Base model", "grpo": "GRPO", "grpo+dqo": "GRPO + DQO", "qempo-kl": "QEMPO-KL", "spl": "SPL"}
# Okabe and Ito's palette, told apart under every common colour blindness; shapes repeat the distinction.
COLORS = {"base": "#555555", "grpo": "#D55E00", "grpo+dqo": "#0072B2", "qempo-kl": "#009E73", "spl": "#CC79A7"}
MARKERS = {"base": "o", "grpo": "v", "grpo+dqo": "s", "qempo-kl": "D", "spl": "^"}
SHOWN = (16, 64)  # of evaluate.PASS_AT; the table is to fit a terminal of 80 columns
DOT = 16  # square points of a city that was named once
FILES = ("table.txt", "cities.png", "quality_diversity.png", "demo.json")


@dataclass(frozen=True)
class Result:
    """One finished method."""

    method: str
    evaluation: Evaluation
    curve: list[Step]
    floor: float | None = None
    max_kl: float | None = None

    @property
    def seconds_a_step(self) -> float | None:
        """Median, since the first step also pays for warming up; None for the base model."""
        seconds = sorted(s.seconds for s in self.curve)
        return seconds[len(seconds) // 2] if seconds else None


def write(results: list[Result], cities: Cities, facts: dict[str, Any], out: Path) -> None:
    """Write demo.json, table.txt, cities.png and quality_diversity.png of what is finished so far into out."""
    figures = {**facts, "methods": [_as_json(r) for r in results]}
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # By a rename, so that Ctrl-C in the middle leaves the last whole file.
    (out / "demo.json.part").write_text(text, encoding="utf-8")
    (out / "demo.json.part").replace(out / "demo.json")
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table(results))
    for name, picture in (("cities.png", draw_cities(results, cities)), ("quality_diversity.png", draw_trade(results))):
        picture.savefig(out / name, dpi=130)
        plt.close(picture)


def table(results: list[Result]) -> Table:
    """The figures of all finished methods, one line each; demo.json has more."""
    n = len(results[0].evaluation.answers)
    view = Table(
        title=f"{n} fresh answers of each model at temperature 1",
        caption="top: share of the most frequent city. nats: sequence entropy (of right answers).\n"
        "pass@n: chance that n answers hold a city in the country one has in mind,\n"
        "mean over the 20 most populous countries.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("method", no_wrap=True)
    heads = [
        "quality",
        "floor",
        f"cities\nin {BATCH}",
        "top",
        "nats (right)",
        *(f"pass\n@{k}" for k in SHOWN),
        "s a\nstep",
    ]
    for head in heads:
        view.add_column(head, justify="right", no_wrap=True)
    for r in results:
        e = r.evaluation
        view.add_row(
            TITLES[r.method],
            f"{e.quality:.3f}",
            "-" if r.floor is None else f"{r.floor:.3f}",
            f"{e.distinct:.1f}",
            f"{e.top_share:.0%}",
            f"{e.entropy:.2f} ({'-' if e.city_entropy is None else f'{e.city_entropy:.2f}'})",
            *(f"{e.pass_at[k]:.2f}" for k in SHOWN),
            "-" if r.seconds_a_step is None else f"{r.seconds_a_step:.2f}",
        )
    return view


def _as_json(result: Result) -> dict[str, Any]:
    evaluation = asdict(result.evaluation)
    evaluation["answers"] = [[a.text, a.city.id if a.city else None] for a in result.evaluation.answers]
    steps = [asdict(s) for s in result.curve]
    return {
        "method": result.method,
        "floor": result.floor,
        "max_kl": result.max_kl,
        "seconds_a_step": result.seconds_a_step,
        "evaluation": evaluation,
        "curve": {name: [s[name] for s in steps] for name in steps[0]} if steps else {},
    }


def draw_cities(results: list[Result], cities: Cities) -> plt.Figure:
    """One world map a method: the first 100 answers, a dot on each city sized by how often it was recommended."""
    rows = -(-(len(results) + 1) // 2)
    picture, axes = plt.subplots(rows, 2, figsize=(13, 3.3 * rows), squeeze=False, layout="constrained")
    longitude, latitude = [c.longitude for c in cities.all], [c.latitude for c in cities.all]
    for axis, result in zip(axes.flat, results, strict=False):
        color = COLORS[result.method]
        ranked = Counter(a.city for a in result.evaluation.answers[:BATCH] if a.city).most_common()
        axis.scatter(longitude, latitude, s=1.6, color="#c4c4c4", linewidths=0)
        axis.scatter(
            [c.longitude for c, _ in ranked],
            [c.latitude for c, _ in ranked],
            s=[DOT * n for _, n in ranked],
            color=color,
            alpha=0.75,
            edgecolors="white",
            linewidths=0.7,
        )
        _name_cities(axis, ranked[:3])
        right = sum(n for _, n in ranked)
        cities_seen = f"{len(ranked)} different {'city' if len(ranked) == 1 else 'cities'}"
        title = f"{TITLES[result.method]}:  {cities_seen}, {right} of {BATCH} answers right"
        axis.set_title(title, fontsize=13, fontweight="bold", loc="left", color=color)
        axis.set(xlim=(-135, 180), ylim=(-50, 70), xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    _key(axes.flat[len(results)], len(cities.all))
    return picture


def _name_cities(axis: plt.Axes, ranked: list[tuple[City, int]]) -> None:
    """Name the most frequent cities, but none whose name would run into one already there."""
    named: list[City] = []
    for city, n in ranked:
        if any(abs(city.latitude - c.latitude) < 10 and abs(city.longitude - c.longitude) < 70 for c in named):
            continue
        named.append(city)
        east = city.longitude > 105  # there the name goes to the left, or it would leave the map
        text = axis.annotate(
            f"{city.name} {n}",
            (city.longitude, city.latitude),
            xytext=((-1 if east else 1) * (3 + (DOT * n) ** 0.5 / 2), 0),
            textcoords="offset points",
            ha="right" if east else "left",
            va="center",
            fontsize=10,
        )
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def _key(axis: plt.Axes, known: int) -> None:
    """How to read the maps."""
    axis.set(xlim=(0, 1), ylim=(0, 1))
    lines = (
        f"Each map: {BATCH} answers of one model, sampled at temperature 1.",
        "The area of a dot is how often its city was named.",
        f"Grey: all {known:,} cities of 100,000 people or more (geonames).",
    )
    axis.text(0.02, 0.92, "\n".join(lines), fontsize=11, va="top", linespacing=1.6)
    for x, n in ((0.06, 1), (0.2, 5), (0.38, 20), (0.65, 90)):
        axis.scatter([x], [0.36], s=DOT * n, color="#999999", edgecolors="white", linewidths=0.7)
        axis.text(x, 0.08, "once" if n == 1 else f"{n} times", ha="center", fontsize=10)


def draw_trade(results: list[Result]) -> plt.Figure:
    """Quality against distinct cities, and pass@n over n."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for r in results:
        e, color, marker = r.evaluation, COLORS[r.method], MARKERS[r.method]
        error = (e.quality * (1 - e.quality) / len(e.answers)) ** 0.5
        low, high = e.distinct_range
        left.errorbar(
            [e.quality],
            [e.distinct],
            xerr=[error],
            yerr=[[e.distinct - low], [high - e.distinct]],
            color=color,
            marker=marker,
            markersize=12,
            markerfacecolor="none",  # two methods may fall on one point
            markeredgewidth=2.4,
            capsize=3,
            linewidth=1.2,
            linestyle="none",
        )
        n = list(e.pass_at)
        line = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2, "linewidth": 1.8}
        right.plot(n, list(e.pass_at.values()), color=color, marker=marker, label=TITLES[r.method], **line)
    left.set_xlabel("quality: share of answers that are one real city (bar: standard error)")
    left.set_ylabel(f"different cities in {BATCH} answers (bar: range over the batches)")
    left.set_xlim(right=1.02)
    left.set_title("Quality against diversity: up and to the right is better", loc="left", fontweight="bold")
    right.set_xscale("log", base=2)
    right.set_xticks(n, [str(k) for k in n])
    right.set(xlabel="n answers", ylabel="pass@n: a city in the country one has in mind")
    right.set_title("Coverage of the 20 most populous countries", loc="left", fontweight="bold")
    right.legend(loc="upper left", frameon=False, title="both pictures")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return picture
