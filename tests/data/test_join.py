"""`distill data join`: what meets by key, what does not, and the same shards after a kill."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import Write, keys_in
from safetensors.numpy import save_file

from distill_core import Sample, TarShard, UserError
from distill_core.cli import main
from distill_data.join import join, reader_of
from distill_data.partners import Partners
from distill_data.row import Named
from distill_data.writing import Folder

OPTIONS: dict[str, Any] = {
    "prefix": "train",
    "txt": None,
    "several": "error",
    "replace": False,
    "drop": False,
    "jobs": 1,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path, write_shards: Write) -> Named:
    """Two shards of three samples, train-0-0 to train-1-2."""
    return Named("", {"data": [TarShard(path) for path in write_shards(tmp_path / "in", 2, 3)]})


def keys_of(source: Named) -> list[str]:
    return keys_in([Path(shard.name) for shard in source.sets["data"]])


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines, CSV or TSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def samples(out: Path) -> dict[str, Sample]:
    return {str(one["__key__"]): one for path in sorted(out.glob("*.tar")) for one in TarShard(path)}


def run(source: Named, new: Path, out: Path, reader: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    made = reader_of(new, **{"key": "key", "columns": None, "keys": None, "field": "embedding"} | (reader or {}))
    return join(source, made, out, **OPTIONS | options)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_columns_go_into_the_json(tmp_path: Path, source: Named, suffix: str) -> None:
    """All fields that were there stay, in as many shards, in order."""
    keys = keys_of(source)
    caption = 'a "red", bird\nsings'
    new = table(
        tmp_path / f"new{suffix}", [{"key": key, "caption": f"{caption} {key}", "other": "x"} for key in keys[::-1]]
    )
    report = run(source, new, tmp_path / "out", {"columns": ["caption"]})
    assert [len(TarShard(path)) for path in sorted((tmp_path / "out").glob("*.tar"))] == [3, 3]
    before = {str(one["__key__"]): one for shard in source.sets["data"] for one in shard}
    made = samples(tmp_path / "out")
    assert list(made) == keys
    for key, one in made.items():
        assert json.loads(one["json"]) == {"caption": f"{caption} {key}"}
        assert (one["png"], one["txt"]) == (before[key]["png"], before[key]["txt"])
    assert report["notes"] == {"samples joined": 6}


def test_keys_without_a_partner_are_counted_on_both_sides(
    tmp_path: Path, source: Named, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(source)
    new = table(tmp_path / "new.jsonl", [{"key": key, "c": 1} for key in [*keys[:4], "elsewhere", "nowhere"]])
    report = run(source, new, tmp_path / "keep")
    counts = report["joined"]
    assert (counts["keys"], counts["keys_without_sample"], counts["samples_without_key"]) == (6, 2, 2)
    assert counts["examples"]["keys_without_sample"] == ["elsewhere", "nowhere"]
    assert counts["examples"]["samples_without_key"] == keys[4:]
    assert report["samples"] == 6
    report = run(source, new, tmp_path / "drop", drop=True)
    assert list(samples(tmp_path / "drop")) == keys[:4]
    assert report["joined"] == counts
    assert report["skipped"] == {"nothing is to be joined to its key": 2}
    main(["data", "join", str(tmp_path / "in"), str(new), str(tmp_path / "printed")])
    printed = capsys.readouterr().out
    assert f"2 keys of samples are not in it, as {keys[4]!r}" in printed
    assert "2 of its keys are no sample's, as 'elsewhere'" in printed


def test_a_key_with_several_rows(tmp_path: Path, source: Named) -> None:
    keys = keys_of(source)
    rows = [{"key": keys[0], "c": "one"}, {"key": keys[1], "c": "x"}, {"key": keys[0], "c": "two"}]
    new = table(tmp_path / "new.jsonl", rows)
    with pytest.raises(UserError, match=rf"1 key stands more than once, as '{keys[0]}': choose --several"):
        run(source, new, tmp_path / "error")
    report = run(source, new, tmp_path / "first", several="first")
    assert json.loads(samples(tmp_path / "first")[keys[0]]["json"]) == {"c": "one"}
    assert report["joined"]["repeated_keys"] == 1
    run(source, new, tmp_path / "list", several="list")
    made = samples(tmp_path / "list")
    assert [json.loads(made[key]["json"]) for key in keys[:2]] == [{"c": ["one", "two"]}, {"c": ["x"]}]
    run(source, new, tmp_path / "txt", several="list", txt="c", replace=True)
    assert samples(tmp_path / "txt")[keys[0]]["txt"] == b"one\ntwo"


def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path, source: Named) -> None:
    """With several threads too: the error is one line."""
    new = table(tmp_path / "new.jsonl", [{"key": key, "c": "new"} for key in keys_of(source)])
    for jobs in (1, 3):
        with pytest.raises(UserError, match=r"^[^\n]*has a 'txt' already: choose --replace[^\n]*$"):
            run(source, new, tmp_path / f"out{jobs}", txt="c", jobs=jobs)
    run(source, new, tmp_path / "again", txt="c", replace=True)
    assert {one["txt"] for one in samples(tmp_path / "again").values()} == {b"new"}


def test_embeddings_meet_their_samples(tmp_path: Path, source: Named) -> None:
    """Rows in another order than the samples, of npy and of safetensors with two tensors."""
    keys = keys_of(source)
    values = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float16)
    order = [3, 1, 5, 0, 2, 4]
    np.save(tmp_path / "e.npy", values[order])
    (tmp_path / "e.keys.txt").write_text("".join(f"{keys[i]}\n" for i in order))
    save_file({"a": values[order], "b": np.arange(6)[order]}, tmp_path / "e.safetensors")
    run(source, tmp_path / "e.npy", tmp_path / "npy", {"field": "teacher"})
    run(source, tmp_path / "e.safetensors", tmp_path / "st", {"keys": tmp_path / "e.keys.txt"}, jobs=3)
    first, second = samples(tmp_path / "npy"), samples(tmp_path / "st")
    for i, key in enumerate(keys):
        assert np.array_equal(np.load(io.BytesIO(first[key]["teacher.npy"])), values[i])
        assert np.array_equal(np.load(io.BytesIO(second[key]["a.npy"])), values[i])
        assert np.load(io.BytesIO(second[key]["b.npy"])) == i


def test_parquet(tmp_path: Path, source: Named) -> None:
    """As `distill embed` writes it: a column of lists of floats becomes an array of its type."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    keys = keys_of(source)
    values = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), 4)
    parquet.write_table(pyarrow.table({"key": keys, "embedding": lists, "n": range(6)}), tmp_path / "e.parquet")
    run(source, tmp_path / "e.parquet", tmp_path / "out")
    for i, (key, one) in enumerate(samples(tmp_path / "out").items()):
        assert key == keys[i]
        assert np.array_equal(np.load(io.BytesIO(one["embedding.npy"])), values[i])
        assert json.loads(one["json"]) == {"n": i}


def killed_before(owner: Any, name: str, n: int) -> None:
    """The process is killed in place of the n-th call."""
    function, calls = getattr(owner, name), 0

    def replaced(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    setattr(owner, name, replaced)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [(Partners, "build", 1), (Partners, "of", 2), (Partners, "commit", 2), (Folder, "_note", 2), (Folder, "finish", 1)],
)
def test_a_killed_join_continues_to_the_same_bytes_and_counts(
    tmp_path: Path, source: Named, kill: tuple[Any, str, int]
) -> None:
    """Would catch a key that counts as without a sample because the process that met it has died."""
    keys = keys_of(source)
    new = table(tmp_path / "new.jsonl", [{"key": key, "c": "x"} for key in [*keys[:4], "nowhere"]])
    run(source, new, tmp_path / "whole")

    def child() -> None:
        killed_before(*kill)
        run(source, new, tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    run(source, new, tmp_path / "killed", jobs=2)
    files = [
        {path.name: path.read_bytes().replace(os.fsencode(folder), b"") for path in sorted(folder.iterdir())}
        for folder in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("n.jsonl", '{"key": "a", "c": 1}\n{"key": \n', "n.jsonl:2: not json"),
        ("n.jsonl", '{"name": "a"}\n', "n.jsonl:1: has no 'key' (it has: name). Name the column of keys by --key"),
        ("n.jsonl", "[1]\n", "n.jsonl:1: must be an object"),
        ("n.csv", "key,c\na,1\nb\n", "n.csv:3: has not as many columns as the first line, 2"),
        ("n.npy", "no array", "n.npy: not a numpy array"),
        ("n.csv", "key,c\na,caf\udce9\n", "n.csv: not UTF-8"),
        ("n.txt", "", "is none of .jsonl, .csv"),
    ],
)
def test_rows_that_are_none(
    tmp_path: Path, source: Named, name: str, content: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(SystemExit) as end:
        main(["data", "join", str(tmp_path / "in"), str(tmp_path / name), str(tmp_path / "out")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


def test_arrays_and_keys_that_do_not_fit(tmp_path: Path, source: Named) -> None:
    np.save(tmp_path / "e.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match="does not exist: name the file with the rows' keys"):
        run(source, tmp_path / "e.npy", tmp_path / "out")
    (tmp_path / "e.keys.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"of shape \[3, 2\], and .* has 2 keys"):
        run(source, tmp_path / "e.npy", tmp_path / "out")
