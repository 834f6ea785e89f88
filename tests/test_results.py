"""The committed results: a table that gives back what it was given, pages that say what it says, and its size."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench_modules import ROOT, load

results = load("suite.results")
RUN = {"date": "2026-01-02 00:00 UTC", "device": "cpu", "rounds": 2, "ceilings": []}
CASE = {"op": "dpp", "set": "main", "case": "G=2 k=4 d=8", "groups": 2, "k": 4, "d": 8, "threads": 1}
FLOOR = {"floor_bytes": 640, "floor_flops": 1280, "floor_ms": 0.25}


def _row(provider: str, kind: str, median: float, **more: Any) -> dict[str, Any]:
    return {**CASE, "provider": provider, "kind": kind, "error_gains": 1.25e-7, "mode": "full", "median_ms": median,
            "p20_ms": median, "p80_ms": 2 * median, "samples": 4, **more}  # fmt: skip


def _rows(median: float = 1.5) -> list[dict[str, Any]]:
    """Rows of one case as a run has them in memory: timed ones, memory, a peer that could not run."""
    timed = [_row("ours", "ours", median), _row("peer", "peer", 6.0)]
    for row in timed:
        row.update(turn_ms={"0": row["median_ms"], "1": 2 * row["median_ms"]}, **FLOOR)
    load("suite.interleave").add_ratios(timed)
    return [
        {**CASE, "provider": "gone", "kind": "peer", "reason": "ImportError: no such peer"},
        *timed,
        {**CASE, "provider": "ours", "kind": "ours", "mode": "memory", "memory_mib": 12.125, "kept_mib": 1.0},
    ]


def _without(rows: list[dict[str, Any]], *left_out: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """All but each turn's median; once more through the table they are the same lines."""
    path, again = tmp_path / "cpu.jsonl", tmp_path / "again.jsonl"
    rows = _rows()
    results.save(path, RUN, rows)
    back = results.load(path)
    assert _without(back, "run") == _without(rows, "turn_ms")
    assert back[1]["ratio_to_best_peer"] == 4.0
    assert {key: back[0]["run"][key] for key in RUN} == RUN
    assert len(path.read_text().splitlines()) == 1 + 1 + len(rows)
    results.save(again, RUN, back)
    assert again.read_text().splitlines()[1:] == path.read_text().splitlines()[1:]


def test_every_committed_row_comes_back_from_a_table_of_its_own(tmp_path: Path) -> None:
    for variant in (None, results.SYSTEM_ALLOCATOR):
        rows = results.load(variant=variant)
        assert rows
        for date in dict.fromkeys(row["run"]["date"] for row in rows):
            mine = [row for row in rows if row["run"]["date"] == date]
            path = tmp_path / f"{date}.jsonl"
            results.save(path, mine[0]["run"], mine)
            assert _without(results.load(path, variant), "run") == _without(mine, "run")


def test_a_case_that_is_measured_again_takes_the_place_of_its_rows(tmp_path: Path) -> None:
    """As a whole, and in its place; a run that no case names any more is gone, a variant's rows stay beside."""
    path = tmp_path / "cpu.jsonl"
    other = [{**row, "case": "b"} for row in _rows()]
    results.save(path, RUN, _rows() + other)
    variant = {**RUN, "date": "2026-01-03 00:00 UTC", "variant": results.SYSTEM_ALLOCATOR}
    results.save(path, variant, _rows(3.0))
    newer = {**RUN, "date": "2026-01-04 00:00 UTC"}
    results.save(path, newer, [_row("ours", "ours", 2.0)])
    rows = results.load(path)
    assert [(r["case"], r["provider"], r.get("median_ms")) for r in rows][:2] == [
        (CASE["case"], "ours", 2.0),
        ("b", "gone", None),
    ]
    assert {r["run"]["date"] for r in rows} == {RUN["date"], newer["date"]}
    assert [r["median_ms"] for r in results.load(path, results.SYSTEM_ALLOCATOR) if "median_ms" in r] == [3.0, 6.0]
    results.save(path, newer, [{**_row("ours", "ours", 2.0), "case": "b"}])
    assert RUN["date"] not in path.read_text()


def test_a_folder_has_one_table_a_device_and_a_comparison_takes_its_own(tmp_path: Path) -> None:
    for device, median in (("cpu", 1.5), ("NVIDIA H100 80GB HBM3", 3.0)):
        results.save(results.result_path(tmp_path, device), {**RUN, "device": device}, _rows(median))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.jsonl", "h100.jsonl"]

    def medians(path: Path, device: str) -> list[float]:
        rows = results.committed(path, device)
        return [row["median_ms"] for row in results.pick(rows, provider="ours", mode="full")]

    assert medians(tmp_path, "cpu") == [1.5]
    assert medians(tmp_path, "NVIDIA H100 80GB HBM3") == [3.0]
    assert medians(tmp_path, "another") == []
    # A table that is named is compared with, whatever it was measured on.
    assert medians(tmp_path / "h100.jsonl", "cpu") == [3.0]
    assert len(results.load(tmp_path)) == 2 * len(_rows())


@pytest.mark.parametrize("line", ["[", "{}", '{"run": "no such run", "op": "dpp", "provider": "ours"}', '"device"'])
def test_a_line_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cpu.jsonl"
    results.save(path, RUN, _rows())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"cpu\.jsonl: line 7 is none of a table of results"):
        results.load(path)


def test_pages_match_the_results() -> None:
    """The tables of README and docs/, and the generated pages, are those that the committed table makes."""
    pages = load("report.pages")
    rows = results.pick(results.load(), run=lambda run: run["device"] == "cpu")
    stale = [str(path) for path, text in pages.written(rows) if path.read_text() != text]
    assert not stale, "run python -P bench/report/pages.py"


def test_readme_has_six_rows_that_a_change_of_the_table_changes() -> None:
    headlines = load("report.headlines")
    rows = results.load()
    block = headlines.readme(rows)
    lines = [line for line in block.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 6
    exact = next(p for p in headlines.logps_pairs(headlines.all_threads(rows)) if p.mine["dtype"] == "bfloat16")
    assert f"{exact.mine['median_ms']:.0f} ms" in lines[1]
    assert f" {exact.mine['ratio_to_best_peer']:.2f} " in lines[1]
    slower = [{**row, "median_ms": 7e6} if row.get("case") == exact.mine["case"] else row for row in rows]
    assert headlines.readme(slower) != block


def test_the_readme_command_repeats_its_first_row() -> None:
    headlines, suite = load("report.headlines"), load("suite.run")
    words = shlex.split(headlines.REPEAT)[2:]
    given = list(zip(words[::2], words[1::2], strict=True))
    names = tuple(value for option, value in given if option == "--provider")
    one = dict(given)
    plan = suite.planned(
        suite.Options((one["--op"],), one["--case"], providers=names, threads=(int(one["--threads"]),))
    )
    exact = headlines.logps_pairs(headlines.all_threads(results.load()))[0]
    found = next(run for run in plan if str(run.case) == exact.mine["case"])
    assert set(found.names) == {exact.mine["provider"], exact.peer["provider"]}
    assert found.threads == exact.mine["threads"]


def test_every_row_that_loses_is_named() -> None:
    headlines = load("report.headlines")
    rows = results.load()
    lost = [row for row in headlines.headlines(rows) if row["ratio_to_best_peer"] < 1]
    named = headlines.losing(rows)
    assert lost
    for row in lost:
        assert f"{row['case']}, {row['provider']}**: " in named


def _tracked() -> list[Path]:
    """What a clone has, and what a commit of all would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone, and this is none")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_results_pictures_and_the_checkout_stay_small() -> None:
    """The table has thousands of lines and not tens of thousands, and a clone is 5.5 MB at most, a fifth of it
    pictures."""
    tracked = _tracked()
    counted = [path for path in tracked if results.FOLDER in path.parents or path.suffix == ".svg"]
    assert results.FOLDER / "cpu.jsonl" in counted
    assert sum(len(path.read_text().splitlines()) for path in counted) < 15_000
    assert sum(path.stat().st_size for path in tracked) < 5_500_000
    assert len((ROOT / "docs" / "benchmarks.md").read_text().splitlines()) < 200


def test_a_picture_is_there_once_and_on_a_page() -> None:
    pictures = [path for path in (ROOT / "docs" / "images").rglob("*") if path.suffix in (".png", ".svg")]
    assert len({path.with_suffix("") for path in pictures}) == len(pictures)
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert [path.name for path in pictures if f"/{path.name})" not in pages] == []


def test_every_picture_is_drawn_from_the_table_alone(tmp_path: Path) -> None:
    """With a palette, which is what keeps them small; a picture whose rows are not there is left out."""
    pytest.importorskip("matplotlib", reason="draws the pictures")
    plots, image = load("report.plots"), pytest.importorskip("PIL.Image")
    rows = results.load()
    plots.draw(rows, tmp_path)
    drawn = {path.name: image.open(path).mode for path in tmp_path.iterdir()}
    assert set(drawn.values()) == {"P"}
    assert {"speedup.png", "error_kept.png", "linear_logps_time.png"} <= drawn.keys()
    assert drawn.keys() <= {path.name for path in (ROOT / "docs" / "images").iterdir()}
    left = [row for row in rows if row["op"] != "sampled_error"]
    plots.error_kept(left, tmp_path / "none")
    assert not (tmp_path / "none").exists()
