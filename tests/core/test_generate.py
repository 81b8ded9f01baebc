"""Sequences written token by token, against all sequences that there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from distill_core.generate import write

END, SIZE, LONGEST = 2, 4, 4


class Table:
    """The logits of the next id, by all ids so far; other ones for each sequence and prefix."""

    def __init__(self, seed: int, beams: int) -> None:
        self.seed, self.beams = seed, beams
        self.asked: list[int] = []

    def of(self, row: int, prefix: tuple[int, ...]) -> Tensor:
        draw = torch.Generator().manual_seed(hash((self.seed, row, prefix)) % 2**31)
        return 2 * torch.randn(SIZE, generator=draw)

    def __call__(self, ids: Tensor) -> Tensor:
        self.asked.append(len(ids))
        return torch.stack([self.of(i // self.beams, tuple(row)) for i, row in enumerate(ids.tolist())])

    def score(self, row: int, sequence: tuple[int, ...], begun: int) -> tuple[float, int]:
        """Log-probability and number of what follows the first ids."""
        total = 0.0
        for i in range(begun, len(sequence)):
            total += float(self.of(row, sequence[:i]).log_softmax(-1)[sequence[i]])
        return total, len(sequence) - begun


def sequences(start: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All that end with `END`, or are as long as may be."""
    every = []
    for count in range(1, LONGEST - len(start) + 1):
        for more in product(range(SIZE), repeat=count):
            ended = more[-1] == END
            if END not in more[:-1] and (ended or count == LONGEST - len(start)):
                every.append((*start, *more))
    return every


@pytest.mark.parametrize("seed", range(6))
def test_with_beams_for_all_sequences_the_best_of_all_is_found(seed: int) -> None:
    """Two sequences at a time. Would catch beams of one sequence that mix with another's, an end that is continued or
    costs, scores that are not divided by each one's own length."""
    table = Table(seed, beams=SIZE**3)
    found = write(table, torch.tensor([[1], [3]]), end=END, longest=LONGEST, beams=SIZE**3)
    for row, first in enumerate((1, 3)):
        best = max(sequences((first,)), key=lambda s: (lambda total, n: total / n)(*table.score(row, s, 1)))
        assert tuple(found[row].tolist()[: len(best)]) == best
        assert set(found[row].tolist()[len(best) :]) <= {END}


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_takes_the_likeliest_token_each_time(seed: int) -> None:
    """Would catch a first step that takes another, and a sequence that is asked for on after all have ended."""
    table = Table(seed, beams=1)
    found = write(table, torch.tensor([[1, 0]]), end=END, longest=6)
    expected = [1, 0]
    while len(expected) < 6 and expected[-1] != END:
        expected.append(int(table.of(0, tuple(expected)).argmax()))
    assert found.tolist() == [expected]
    assert len(table.asked) == len(expected) - 2


def test_a_start_of_full_length_is_left_as_it_is() -> None:
    assert write(Table(0, beams=2), torch.tensor([[1, 3]]), end=END, longest=2, beams=2).tolist() == [[1, 3]]
