from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import harness
import pytest


class Clock:
    """Time that passes only when a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def read(self) -> float:
        return self.now

    def contestant(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.calls.append(name)
            self.now += seconds

        return work


def test_contestants_take_turns_and_each_starts_a_round() -> None:
    clock = Clock()
    contestants = {name: clock.contestant(name, 0.5) for name in "abc"}
    timing = harness.interleave(contestants, rounds=3, warmup=0, clock=clock.read)
    assert "".join(clock.calls[-9:]) == "abc" + "bca" + "cab"
    assert timing.seconds == {name: [0.5, 0.5, 0.5] for name in "abc"}


def test_a_fast_callable_is_repeated_until_a_sample_is_long_enough() -> None:
    clock = Clock()
    contestants = {"fast": clock.contestant("fast", harness.MINIMUM_SAMPLE / 8)}
    timing = harness.interleave(contestants, rounds=2, warmup=1, clock=clock.read)
    assert len(clock.calls) == 1 + harness.ESTIMATES + 2 * 8
    assert timing.median("fast") == pytest.approx(harness.MINIMUM_SAMPLE / 8)


def test_speed_is_the_median_of_ratios_within_rounds() -> None:
    # In the second round the machine was busy: both took ten times as long.
    timing = harness.Timing({"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 3.0]})
    assert timing.speed("ours", "theirs") == 2.0
    assert timing.speed("theirs", "theirs") == 1.0
    assert timing.median("theirs") == 3.0


def test_results_name_the_machine_and_can_be_read_back(tmp_path: Path) -> None:
    timing = harness.Timing({"ours": [0.001], "theirs": [0.002]})
    path = harness.save("case", [timing.as_json("a product", against="theirs", bits=4)], threads=1, folder=tmp_path)
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == 1 and content["machine"]["versions"]["numpy"]
    row = content["rows"][0]
    assert (row["case"], row["bits"], row["against"], row["rounds"]) == ("a product", 4, "theirs", 1)
    assert row["milliseconds"] == {"ours": 1.0, "theirs": 2.0}
    assert row["speed"] == {"ours": pytest.approx(2.0), "theirs": pytest.approx(1.0)}


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_table("title", harness.Timing({"ours": [0.001], "theirs": [0.002]}), against="theirs")
    text = capsys.readouterr().out
    assert "title" in text and "2.00" in text and "1.000" in text


def test_the_fetcher_is_found_from_a_benchmark_script() -> None:
    assert callable(harness.models().fetch)


def test_the_readme_shows_the_results_as_they_are() -> None:
    """Numbers in the README come from the results files; after a benchmark run harness.py to copy them."""
    text = harness.README.read_text(encoding="utf-8")
    shown = text.partition(harness.README_BEGIN)[2].partition(harness.README_END)[0]
    assert shown.strip() == harness.best_of_each().strip()
    tables = (harness.RESULTS / harness.TABLES).read_text(encoding="utf-8")
    assert tables.endswith(harness.markdown())


def test_results_become_a_table_between_the_marks(tmp_path: Path) -> None:
    timing = harness.Timing({"ours": [0.0015], "theirs": [0.003]})
    named = harness.Timing({"kbitc int4": [0.0015], "kbitc nf4": [0.002], "theirs": [0.003]})
    rows = [timing.as_json("a product", "theirs", value="93 %", float_value="94 %"), named.as_json("another", "theirs")]
    harness.save("b", rows, 1, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{harness.README_BEGIN}old\n{harness.README_END}tail\n")
    harness.update_readme(readme, tmp_path)
    harness.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert text.count("| b | another | int4 | 2.00 | theirs | 1.00 |") == 1 and "a product" not in text
    harness.write_tables(tmp_path)
    tables = (tmp_path / harness.TABLES).read_text()
    assert tables.count("| a product | ours | 1.5 | 2.00 | 93 % |") == 1
    assert "| a product | theirs | 3 | 1.00 | 94 % |" in tables
