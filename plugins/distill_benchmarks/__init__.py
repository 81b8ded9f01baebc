"""Layouts of published benchmarks on disk, as data sources."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Sources of captioned, of labelled and of masked pictures."""
    from distill_benchmarks.captioned import Dci, Karpathy, Urban1k
    from distill_benchmarks.clip_benchmark import ClipBenchmark
    from distill_benchmarks.tux_paint import TuxPaint
    from distill_benchmarks.tux_paint_spoken import SpokenTuxPaint

    return [Karpathy, Urban1k, Dci, ClipBenchmark, TuxPaint, SpokenTuxPaint]
