"""Aim as a tracker: runs go to a local repository beside the run folders; look at it with `aim up`."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """The tracker."""
    from distill_aim.tracker import AimTracker

    return [AimTracker]
