"""From finished runs to a table: means, spreads and paired differences; as text, Markdown, LaTeX and JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from distill_core import did_you_mean
from distill_core.tools import TaskScore, by_address, headlines, means, read_report, read_scores
from distill_study.statistics import LEVEL, Difference, Summary, paired, summarise

LABEL = 28
"""The most letters of a variant's name in a line of the terminal's table."""


@dataclass(frozen=True)
class RunResult:
    """The end of one run; `seconds` is the time of its training steps."""

    folder: str
    seed: int
    scores: Mapping[str, TaskScore]
    """By address."""
    steps: int
    samples: int
    seconds: float
    parameters: int
    split: str

    @classmethod
    def read(cls, folder: Path, seed: int) -> RunResult | None:
        """None where the run is not finished."""
        report = read_report(folder)
        if report is None:
            return None
        facts = {key: report[key] for key in ("steps", "samples", "seconds", "parameters", "split")}
        return cls(folder=str(folder), seed=seed, scores=by_address(read_scores(report["scores"])), **facts)

    def values(self) -> dict[str, float]:
        """The value of each score by its address."""
        return {address: score.value for address, score in self.scores.items()}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `expected` is their number when all are finished."""

    name: str
    label: str
    runs: tuple[RunResult, ...]
    expected: int

    def values(self, score: str) -> dict[int, float]:
        """The score by seed, of the runs that have it."""
        return {run.seed: run.scores[score].value for run in self.runs if score in run.scores}


@dataclass(frozen=True)
class Cell:
    """One score of one group; `difference` is None for the base."""

    values: Mapping[int, float]
    summary: Summary | None
    difference: Difference | None

    def mean(self) -> str:
        """`17.6 ± 0.4`. Where seeds are missing, `StudyTable.rows` adds their number."""
        if self.summary is None:
            return ""
        spread = f" ± {self.summary.std:.2f}" if self.summary.std is not None else ""
        return f"{self.summary.mean:.2f}{spread}"

    def change(self) -> str:
        """The difference with its interval, as `+2.30 [1.50, 2.90]`."""
        if self.difference is None:
            return ""
        d = self.difference
        return f"{d.mean:+.2f}" + (f" [{d.low:.2f}, {d.high:.2f}]" if d.low is not None else "")


@dataclass(frozen=True)
class StudyTable:
    """Rows are groups, columns are scores."""

    title: str
    scores: tuple[str, ...]
    """Addresses."""
    base: str
    groups: tuple[Group, ...]
    cells: Mapping[str, Mapping[str, Cell]]

    @classmethod
    def of(cls, title: str, groups: Sequence[Group], base: str, scores: Sequence[str]) -> StudyTable:
        """Differences are those between each group and the group named `base`, paired by seed."""
        root = next(group for group in groups if group.name == base)
        cells = {
            group.name: {
                score: Cell(
                    group.values(score),
                    summarise(list(group.values(score).values())),
                    None if group is root else paired(group.values(score), root.values(score)),
                )
                for score in scores
            }
            for group in groups
        }
        return cls(title, tuple(scores), base, tuple(groups), cells)

    def score(self, address: str) -> TaskScore | None:
        """The score of the first run that has it, for its unit and direction."""
        runs = (run for group in self.groups for run in group.runs)
        return next((run.scores[address] for run in runs if address in run.scores), None)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads, and one list of words for each group."""
        heads = ["variant"]
        for score in self.scores:
            heads += [score, "difference"]
        heads += ["seeds", "steps", "samples", "s"]
        rows = []
        for group in self.groups:
            row = [group.label]
            for score in self.scores:
                cell = self.cells[group.name][score]
                count_note = f" (n={len(cell.values)})" if 0 < len(cell.values) < group.expected else ""
                row += [cell.mean() + count_note or "missing", "base" if group.name == self.base else cell.change()]
            row += [f"{len(group.runs)}/{group.expected}"]
            row += [
                _distinct_values([run.steps for run in group.runs]),
                _distinct_values([run.samples for run in group.runs]),
            ]
            row += [f"{sum(r.seconds for r in group.runs) / len(group.runs):.0f}" if group.runs else ""]
            rows.append(row)
        return heads, rows

    def notes(self) -> list[str]:
        """What the numbers are, and how reliable they are with few seeds."""
        seeds = sorted({run.seed for group in self.groups for run in group.runs})
        splits = sorted({run.split for group in self.groups for run in group.runs})
        lines = [f"Scores on {', '.join(splits) or 'nothing'}; s is the mean training time of a run in seconds."]
        for address in self.scores:
            score = self.score(address)
            if score is not None and (score.unit != "percent" or score.higher_is_better is False):
                direction = ", lower is better" if score.higher_is_better is False else ""
                lines.append(f"{address}: {score.unit}{direction}.")
        if len(seeds) < 2:
            return [*lines, "One seed: no spread and no interval; a difference may be chance."]
        pairs = [len(cell.difference.seeds) for row in self.cells.values() for cell in row.values() if cell.difference]
        fewest = min((count for count in pairs if count > 1), default=None)
        lines.append(
            f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}. Difference to "
            f"{next(g.label for g in self.groups if g.name == self.base)!r}, paired by seed, with a {LEVEL:.0%} "
            "percentile bootstrap interval over seeds."
        )
        if fewest is not None and fewest < 6:
            lines.append(
                f"With {fewest} seeds the interval {'is the range of the differences' if fewest <= 3 else 'is rough'}: "
                f"were they independent draws around a symmetric truth, the range of {fewest} would cover it in "
                f"{1 - 2 * 0.5**fewest:.0%} of studies, whatever level is written beside it."
            )
        if 1 in pairs:
            lines.append("A difference without an interval is of one pair of runs: it may be chance.")
        return lines


def _distinct_values(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def default_scores(results: Sequence[RunResult]) -> list[str]:
    """The student's headlines; all means over sets where there are none."""
    scores = [score for run in results for score in run.scores.values()]
    shown_scores = [score for score in headlines(scores) if score.side == "student"] or means(scores)
    return list(dict.fromkeys(score.address for score in shown_scores))


def unknown_scores(scores: Sequence[str], results: Sequence[RunResult]) -> dict[str, str]:
    """score -> message, for the scores that none of the results has."""
    names = list(dict.fromkeys(score for run in results for score in run.scores))
    return {
        score: f"no run has a score {score!r}{did_you_mean(score, names)}" for score in scores if score not in names
    }


def as_rich(table: StudyTable) -> RichTable:
    """For the terminal, which is narrow: differences are below their means, values that all rows share in the title."""
    heads, rows = table.rows()
    scores = range(1, 2 * len(table.scores), 2)
    columns = list(range(1 + 2 * len(table.scores), len(heads)))
    constant = [i for i in columns if heads[i] != "s" and len({row[i] for row in rows}) == 1]
    shared = ", ".join(f"{heads[i]} {rows[0][i]}" for i in constant)
    rich_table = RichTable(title=f"{table.title} ({shared})" if shared else table.title, title_justify="left")
    columns = [i for i in columns if i not in constant]
    rich_table.add_column(heads[0], no_wrap=True)
    for i in scores:
        rich_table.add_column(heads[i].replace("/", "/\n"), justify="right", overflow="fold")
    for i in columns:
        rich_table.add_column(heads[i], justify="right", no_wrap=True)
    for row in rows:
        cells = [escape(f"{row[i]}\n{row[i + 1]}".strip()) for i in scores]
        rich_table.add_row(escape(_folded(row[0])), *cells, *(row[i] for i in columns), end_section=row is not rows[-1])
    return rich_table


def _folded(label: str) -> str:
    """Lines that break between options, not in the middle of a word that is shorter than a line."""
    lines = [""]
    for part in re.findall(rf"[^\s,(]{{1,{LABEL}}}[\s,(]*|[\s,(]+", label):
        if lines[-1] and len(lines[-1] + part.rstrip()) > LABEL:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(table: StudyTable) -> str:
    """A heading, the table, its notes."""
    heads, rows = table.rows()
    lines = [f"# {table.title}", "", _line(heads), "|---|" + "---:|" * (len(heads) - 1), *map(_line, rows), ""]
    return "\n".join([*lines, *table.notes()]) + "\n"


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", r"\|") for word in words) + " |"


def as_latex(table: StudyTable) -> str:
    """A `tabular` with booktabs' rules; the notes are comments."""
    heads, rows = table.rows()
    lines = [f"% {line}" for line in [table.title, *table.notes()]]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, heads)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def _tex(word: str) -> str:
    escaped = "".join(_TEX.get(character, character) for character in word)
    return f"${escaped[0]}${escaped[1:]}" if word[:1] in ("-", "+") and word[1:2].isdigit() else escaped


def as_json(table: StudyTable) -> dict[str, Any]:
    """Every number of the table, and every score of every run."""
    return {
        "title": table.title,
        "base": table.base,
        "scores": list(table.scores),
        "level": LEVEL,
        "variants": [
            {
                "name": group.name,
                "label": group.label,
                "scores": {score: asdict(cell) for score, cell in table.cells[group.name].items()},
                "runs": [{**asdict(run), "scores": run.values()} for run in group.runs],
            }
            for group in table.groups
        ],
        "notes": table.notes(),
    }
