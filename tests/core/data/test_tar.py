"""The strict reader of tars: whatever a flipped bit, a cut or a run of zeros does, no sample is lost without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from distill_core.data.shard import Unusable
from distill_core.data.tar import Damaged, members, scan
from distill_core.data.tar_samples import read_shard
from distill_core.data.tar_shards import TarShard
from distill_core.errors import BadSample, DataError

Members = Sequence[tuple[str, bytes]]
Fields = dict[str, bytes]


def tar_of(files: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def drawn(rng: np.random.Generator, prefix: str = "train") -> Members:
    """2 to 6 samples of a text and a picture. The last is larger than what any tar is filled up with.

    Smaller ones at the end cannot be told from filling when they are zeros: only an index could.
    """
    count = int(rng.integers(2, 7))
    sizes = [*rng.integers(0, 3000, count - 1), 12_000]
    return [
        (f"{prefix}-{i}.{field}", rng.bytes(size if field == "png" else 40))
        for i, size in enumerate(sizes)
        for field in ("txt", "png")
    ]


def read(shard: Path) -> tuple[list[tuple[str, Fields]], str | None]:
    """(key, fields) of the samples, and the error at the end."""
    found: list[tuple[str, Fields]] = []
    message = None
    try:
        for sample in read_shard(str(shard)):
            if isinstance(sample, Unusable):
                found.append((sample["__key__"], {}))
                continue
            found.append((sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")}))
    except DataError as error:
        message = str(error)
    assert message is None or (str(shard) in message and "\n" not in message)
    _compare_with_reading_by_number(shard, found, message)
    return found, message


def _compare_with_reading_by_number(shard: Path, found: list[tuple[str, Fields]], message: str | None) -> None:
    """Training's way gives the same samples, and one in place of all that follows the damage."""
    by_number = TarShard(shard)
    try:
        length = len(by_number)
    except DataError:
        assert message is not None
        assert not found
        return
    assert length == len(found) + (message is not None)
    for number in reversed(range(length)):
        sample = by_number[number]
        if number == len(found):
            assert isinstance(sample, Unusable)
            with pytest.raises(BadSample) as bad:
                sample["png"]
            assert str(bad.value) == message
        elif isinstance(sample, Unusable):
            assert found[number] == (sample["__key__"], {})
        else:
            assert found[number] == (
                sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")}
            )  # fmt: skip


def in_samples(files: Members) -> list[tuple[str, Fields]]:
    found: dict[str, Fields] = {}
    for name, content in files:
        key, _, field = name.rpartition(".")
        found.setdefault(key, {})[field] = content
    return list(found.items())


def sizes_of(samples: Sequence[tuple[str, Fields]]) -> list[tuple[str, dict[str, int]]]:
    return [(key, {field: len(content) for field, content in fields.items()}) for key, fields in samples]


def flip(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def headers_of(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [info.offset for info in tar.getmembers()]


def fuzz(data: bytes, how: str, rng: np.random.Generator) -> bytes:
    header = int(rng.choice(headers_of(data)))
    anywhere = int(rng.integers(len(data)))
    if how == "a bit of a header":
        return flip(data, header + int(rng.integers(512)), int(rng.integers(8)))
    if how == "a bit":
        return flip(data, anywhere, int(rng.integers(8)))
    if how == "a cut":
        return data[:anywhere]
    if how == "a cut at a member":
        return data[:header]
    if how == "zeros from a member on":
        return data[:header] + bytes(len(data) - header)
    start = anywhere if how == "zeros" else header
    length = min(int(rng.integers(1, 6000)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


FUZZ = (
    "a bit of a header",
    "a bit",
    "a cut",
    "a cut at a member",
    "zeros from a member on",
    "zeros",
    "zeros at a member",
)


@pytest.mark.slow
@pytest.mark.parametrize("how", FUZZ)
def test_no_damage_passes_in_silence(tmp_path: Path, how: str) -> None:
    """700 fuzzed shards. Without an error all samples are there, changed in their contents at most; with one, what came
    before it are the first samples, each with all its fields."""
    shard = tmp_path / "fuzzed.tar"
    silent = 0
    for case in range(100):
        rng = np.random.default_rng((case, len(how)))
        files = drawn(rng)
        data = tar_of(files, tarfile.GNU_FORMAT if case % 2 else tarfile.USTAR_FORMAT)
        shard.write_bytes(fuzz(data, how, rng))
        samples, error = read(shard)
        expected = sizes_of(in_samples(files))
        if error is None:
            silent += 1
            assert sizes_of(samples) == expected, f"case {case}"
        else:
            assert sizes_of(samples) == expected[: len(samples)], f"case {case}: {error}"
    if how in ("a cut at a member", "zeros from a member on", "zeros at a member"):
        assert silent == 0
    if how in ("a bit", "zeros"):
        assert silent > 0, "no case that changes a content alone: this shows little"


def test_a_bit_of_an_extended_header_loses_nothing(tmp_path: Path) -> None:
    """POSIX headers have no checksum of their content: a name may change, but then its members still come."""
    shard = tmp_path / "fuzzed.tar"
    for case in range(60):
        rng = np.random.default_rng(case)
        files = drawn(rng, prefix="folder/\N{LATIN SMALL LETTER E WITH ACUTE}" + "x" * 100)
        data = tar_of(files, tarfile.PAX_FORMAT)
        shard.write_bytes(data)
        assert read(shard) == (in_samples(files), None)
        shard.write_bytes(flip(data, int(rng.integers(len(data) - 20_000)), int(rng.integers(8))))
        samples, error = read(shard)
        if error is None:
            assert len(samples) >= len(in_samples(files)), f"case {case}"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_compressed_shards_under_any_name(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """Catches a whole one that is called cut off for its name, and cuts at a member that pass for the end."""
    files = drawn(np.random.default_rng(0))
    data = tar_of(files)
    for name in ("whole.tar", "whole.tar.gz", "whole.tgz", "whole"):
        shard = tmp_path / name
        shard.write_bytes(compress(data))
        assert read(shard) == (in_samples(files), None)
    for header in headers_of(data)[2:]:
        shard.write_bytes(compress(data[:header]))
        samples, error = read(shard)
        assert error is not None
        assert "cut off" in error
        assert samples == in_samples(files)[: len(samples)]
    packed = compress(data)
    for keep in range(20, len(packed), len(packed) // 20):
        shard.write_bytes(packed[:keep])
        samples, error = read(shard)
        assert error is not None, f"the first {keep} of {len(packed)} bytes"
        assert samples == in_samples(files)[: len(samples)]


def test_a_wrong_checksum_of_gzip_is_told(tmp_path: Path) -> None:
    files = drawn(np.random.default_rng(1))
    packed = gzip.compress(tar_of(files))
    shard = tmp_path / "x.tar.gz"
    shard.write_bytes(flip(packed, len(packed) - 6, 3))
    samples, error = read(shard)
    assert samples == in_samples(files)
    assert error is not None
    assert "CRC" in error


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(format: int) -> None:
    """Names of all lengths, empty files, folders and links between members, and a sparse file that is refused."""
    rng = np.random.default_rng(format)
    names = [f"{'d' * 40}/{'x' * n}.png" for n in (1, 50, 55, 58, 59, 60, 96)]
    if format != tarfile.USTAR_FORMAT:
        names += ["y" * 300 + ".png", "\N{SNOWMAN}.txt", "z/" * 90 + "a.b"]
    out = io.BytesIO()
    expected = []
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo("other")
                info.type, info.linkname = kind, "y" * (300 if format != tarfile.USTAR_FORMAT else 20)
                tar.addfile(info)
            expected.append((name, rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 2000])))))
            info = tarfile.TarInfo(name)
            info.size = len(expected[-1][1])
            tar.addfile(info, io.BytesIO(expected[-1][1]))
    whole = list(members(io.BytesIO(out.getvalue())))
    assert [(member.name, member.content) for member in whole] == expected
    assert [(m.name, m.start, m.end) for m in scan(io.BytesIO(out.getvalue()))] == [
        (m.name, m.start, m.end) for m in whole
    ]
    for member in whole:  # each stands for itself at its place
        (again,) = members(io.BytesIO(out.getvalue()[member.start : member.end]), part=True)
        assert (again.name, again.content) == (member.name, member.content)
    sparse = bytearray(tar_of([("a.png", b"x")], tarfile.GNU_FORMAT))
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    with pytest.raises(Damaged, match="sparse"):
        list(members(io.BytesIO(bytes(sparse))))


def test_a_size_that_is_nonsense_does_not_take_the_memory(tmp_path: Path) -> None:
    """A header may be whole and still say 8 GiB."""
    info = tarfile.TarInfo("a.png")
    info.size = 8 << 30
    shard = tmp_path / "a.tar"
    shard.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000)
    samples, error = read(shard)
    assert samples == []
    assert error is not None
    assert "cut off" in error


def test_a_name_that_is_not_utf8_stays_usable(tmp_path: Path) -> None:
    """Catches keys that cannot be hashed, printed or written to a file, and two names that become one key."""
    shard = tmp_path / "latin.tar"
    files = [("caf\udce9.png", b"1"), ("caf\udce9.txt", b"2"), ("caf\udce8.png", b"3"), ("caf\udce8.txt", b"4")]
    shard.write_bytes(tar_of(files))
    with tarfile.open(shard) as tar:
        assert tar.getnames()[0].encode("utf-8", "surrogateescape") == b"caf\xe9.png"
    samples, error = read(shard)
    assert error is None
    assert samples == [("caf\\xe9", {"png": b"1", "txt": b"2"}), ("caf\\xe8", {"png": b"3", "txt": b"4"})]
    assert all(key.encode() for key, _ in samples)


def test_a_key_that_comes_again_costs_its_own_sample_alone(tmp_path: Path) -> None:
    """Catches a rest of the shard that is dropped, a second copy that is used in silence, and one that is not named."""
    shard = tmp_path / "twice.tar"
    names = ["a.png", "a.txt", "b.png", "b.txt", "b.png", "b.txt", "b.png", "b.txt", "c.png", "c.txt"]
    shard.write_bytes(tar_of([(name, name.encode()) for name in names]))
    samples = list(read_shard(str(shard)))
    assert [sample["__key__"] for sample in samples] == ["a", "b", "b", "b", "c"]
    assert [isinstance(sample, Unusable) for sample in samples] == [False, False, True, True, False]
    assert samples[4]["png"] == b"c.png"
    for look in (lambda s: s["png"], lambda s: "png" in s, lambda s: s.get("png")):
        with pytest.raises(BadSample, match="its key is that of the sample just before it"):
            look(samples[2])
    assert samples[2]["__url__"] == str(shard)
