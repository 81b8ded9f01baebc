"""The machines that a plan is for, and how long they take: estimates from FLOPs, bytes and link speeds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Equal devices in nodes. Speeds are a device's own, in one direction."""

    devices: int = 1
    memory: float = 80e9
    """Bytes of a device."""
    reserve: float = 0.1
    """Share of them for what a plan does not see: the driver's context, buffers of collectives, fragmentation."""
    flops: float = 990e12
    """Peak FLOP/s in the precision of the products."""
    utilization: float = 0.35
    """Share of the peak that a step reaches."""
    node: int = 8
    """Devices in a node."""
    bandwidth: float = 450e9
    """Bytes/s between the devices of a node."""
    network: float = 50e9
    """Bytes/s of a device to other nodes."""

    @property
    def usable(self) -> float:
        """Bytes of a device that a step may take."""
        return self.memory * (1 - self.reserve)

    def seconds_of_products(self, flops: float) -> float:
        """Of so many FLOPs on one device."""
        return flops / (self.flops * self.utilization)

    def seconds_to_gather(self, size: float, ranks: int) -> float:
        """For every one of `ranks` neighbours to have a tensor of so many bytes, of which each held an equal part; or,
        the other way round, to have its part of a sum of theirs.

        Rings: between nodes first, a device's part of them over its own link; then within each node.
        """
        inside = min(ranks, self.node)
        nodes = ranks / inside
        return size * (inside - 1) / inside / self.bandwidth + size * (nodes - 1) / nodes / inside / self.network

    def seconds_to_sum(self, size: float, shard: int) -> float:
        """For the copies of a tensor of so many bytes to be summed, one on each `shard`-th device."""
        copies = self.devices // shard
        inside = max(1, min(copies, self.node // shard))
        nodes = copies / inside
        within, between = (
            size * (inside - 1) / inside / self.bandwidth,
            size * (nodes - 1) / nodes / inside / self.network,
        )
        return 2 * (within + between)
