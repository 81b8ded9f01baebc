"""Tables of hand-made runs: the words of each cell, and the same numbers as JSON."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from score_values import means

from distill_core.evaluate.score import TaskScore, by_address
from distill_study.picture import axis_label, draw
from distill_study.table import (
    Group,
    RunResult,
    StudyTable,
    as_json,
    as_latex,
    as_markdown,
    as_rich,
    default_scores,
)

M, TOP = "student/retrieval/M", "student/zero_shot/top1"


def group(name: str, scores: dict[int, float], label: str | None = None, wanted: int = 3) -> Group:
    runs = tuple(
        RunResult(
            f"{name}-seed{seed}", seed, by_address(means({M: score, TOP: score / 2})), 40, 160, 2.0 + seed, 7, "test"
        )
        for seed, score in scores.items()
    )
    return Group(name, label or name, runs, wanted)


def table() -> StudyTable:
    groups = [
        group("clip", {0: 10.0, 1: 12.0, 2: 14.0}),
        group("cosmos", {0: 11.0, 1: 15.0, 2: 16.0}, "a_b, 50% & x|y"),
        group("cut", {1: 11.0}),
        group("none", {}),
    ]
    return StudyTable.of("t", groups, "clip", [M])


def test_cells() -> None:
    heads, rows = table().rows()
    assert heads == ["variant", M, "difference", "seeds", "steps", "samples", "s"]
    assert rows == [
        ["clip", "12.00 ± 2.00", "base", "3/3", "40", "160", "3"],
        # +1, +3, +2: the interval of three is their range; std of 11, 15, 16 is sqrt(7)
        ["a_b, 50% & x|y", "14.00 ± 2.65", "+2.00 [1.00, 3.00]", "3/3", "40", "160", "3"],
        ["cut", "11.00 (n=1)", "-1.00", "1/3", "40", "160", "3"],
        ["none", "missing", "", "0/3", "", "", ""],
    ]


def test_the_notes_say_how_little_few_seeds_are() -> None:
    """1 - 2 / 2^3 = 75 %: the chance that the range of three draws holds their median."""
    groups = [group("a", {0: 1.0, 1: 2.0, 2: 3.0}), group("b", {0: 2.0, 1: 2.0, 2: 9.0})]
    notes = " ".join(StudyTable.of("t", groups, "a", [M]).notes())
    assert "the range of 3 would cover it in 75% of studies" in notes
    # one pair beside three says nothing of the interval of three
    notes = StudyTable.of("t", [*groups, group("c", {1: 4.0})], "a", [M]).notes()
    assert "the range of 3 would cover it in 75% of studies" in notes[-2]
    assert notes[-1] == "A difference without an interval is of one pair of runs: it may be chance."
    pair = StudyTable.of("t", [groups[0], group("c", {1: 4.0})], "a", [M]).notes()
    assert not any("0% of studies" in line for line in pair)
    one = StudyTable.of("t", [group("a", {0: 1.0}), group("b", {0: 2.0})], "a", [M]).notes()
    assert one[-1].startswith("One seed: no spread and no interval")


def test_names_on_a_narrow_terminal() -> None:
    """Would catch names that break in the middle of a word, and columns that say the same in every row."""
    groups = [group("a", {0: 1.0}, "loss.1.weight=0.5", 1), group("b", {0: 2.0}, "fusion=attention(heads=2), lr=1", 1)]
    file = io.StringIO()
    Console(file=file, width=60).print(as_rich(StudyTable.of("t", groups, "a", [M, TOP])))
    shown = file.getvalue()
    assert all(part in shown for part in ("│ loss.1.weight=0.5 ", "│ fusion=attention(heads=2), │", "│ lr=1 "))
    assert shown.splitlines()[0].strip() == "t (seeds 1/1, steps 40, samples 160)"
    assert max(map(len, shown.splitlines())) <= 60


def test_markdown() -> None:
    lines = as_markdown(table()).splitlines()
    assert lines[0] == "# t"
    assert lines[2] == f"| variant | {M} | difference | seeds | steps | samples | s |"
    assert lines[3] == "|---|---:|---:|---:|---:|---:|---:|"
    assert lines[5] == r"| a_b, 50% & x\|y | 14.00 ± 2.65 | +2.00 [1.00, 3.00] | 3/3 | 40 | 160 | 3 |"


def test_latex_is_escaped_and_every_row_has_every_column() -> None:
    text = as_latex(table())
    assert r"a\_b, 50\% \& x|y & 14.00 $\pm$ 2.65 & $+$2.00 [1.00, 3.00]" in text
    assert r"& $-$1.00 &" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 5
    assert {line.replace(r"\&", "").count("&") for line in rows} == {6}
    assert r"\begin{tabular}{lrrrrrr}" in text


def test_json_has_the_numbers_behind_the_words() -> None:
    found = json.loads(json.dumps(as_json(table())))
    cosmos = found["variants"][1]["scores"][M]
    assert cosmos["values"] == {"0": 11.0, "1": 15.0, "2": 16.0}
    assert cosmos["difference"] == {"seeds": [0, 1, 2], "mean": 2.0, "low": 1.0, "high": 3.0, "above": 3}
    assert found["variants"][0]["scores"][M]["difference"] is None
    assert found["variants"][1]["runs"][2]["scores"][TOP] == 8.0


def test_default_scores_are_the_students_headlines() -> None:
    scores = [
        *means({"student/r/A": 1.0, "student/r/B": 1.0, "teacher/r/A": 1.0, "student/z/C": 1.0}, "A", "C"),
        TaskScore("set", "A", 1.0, headline=True, side="student", task="r"),
    ]
    run = RunResult("f", 0, by_address(scores), 1, 1, 1.0, 1, "test")
    assert default_scores([run]) == ["student/r/A", "student/z/C"]
    other = RunResult("f", 0, by_address(means({"student/t/iou": 1.0})), 1, 1, 1.0, 1, "test")
    assert default_scores([other]) == ["student/t/iou"]
    assert default_scores([]) == []


@pytest.mark.slow
def test_a_tie_of_seeds_is_drawn(tmp_path: Path) -> None:
    """The mean of one number three times is not that number in floating point; an error bar of -4e-16 is refused."""
    for value in (18.75 / 7, 0.1, 17.6, 64.0625):
        results = tuple(
            RunResult(str(tmp_path / f"a-seed{seed}"), seed, by_address(means({M: value})), 3, 3, 1.0, 1, "test")
            for seed in range(3)
        )
        groups = [Group("a", "a", results, 3), Group("b", "b", results[:2], 3)]
        draw(StudyTable.of("t", groups, "a", [M]), tmp_path / f"{value}.png")
        assert (tmp_path / f"{value}.png").stat().st_size > 0


@pytest.mark.slow
def test_the_picture_has_a_panel_for_each_score_and_takes_missing_runs(tmp_path: Path) -> None:
    run = tmp_path / "a-seed0"
    run.mkdir()
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = RunResult(str(run), 0, by_address(means({M: 1.0})), 3, 3, 1.0, 1, "test")
    groups = [Group("a", "a", (result,), 1), Group("b", "b", (), 1)]
    draw(StudyTable.of("t", groups, "a", [M]), tmp_path / "small.png")
    draw(StudyTable.of("t", groups, "a", [M, TOP, "x/y/z"]), tmp_path / "large.png")
    from PIL import Image

    small, large = Image.open(tmp_path / "small.png"), Image.open(tmp_path / "large.png")
    assert large.width > small.width  # four panels in two rows of three
    assert large.height > small.height


def test_a_score_that_is_better_lower_says_so(tmp_path: Path) -> None:
    """Would catch a loss in nats that table and picture show as a percentage of which more is better."""
    loss = TaskScore(None, "loss", 0.5, "nats", higher_is_better=False, side="student", task="lm")
    result = RunResult("f", 0, by_address([loss, *means({M: 1.0})]), 1, 1, 1.0, 1, "test")
    table = StudyTable.of("t", [Group("a", "a", (result,), 1)], "a", [M, loss.address])
    assert table.notes()[1] == "student/lm/loss: nats, lower is better."
    assert not any(M in line for line in table.notes())
    assert [axis_label(table, address) for address in (M, loss.address, "x/y/z")] == [
        "percent",
        "nats (lower is better)",
        "",
    ]
