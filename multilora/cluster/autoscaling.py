"""How many replicas a cluster should have: so many that neither requests nor their adapters crowd any of them.

Pure. Delays, bounds and smoothing are Serve's, which makes a `ReplicaScaling` by its name and asks it.
"""

import math
from typing import Any


class ReplicaScaling:
    """Serve's question how many replicas there should be. The targets are those of `ClusterConfig`."""

    def __init__(self, target_requests: float, target_pressure: float):
        self._target_requests = target_requests
        self._target_pressure = target_pressure

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        found = (context.aggregated_metrics or {}).get("pressure", {}).values()
        pressures = [value for value in found if value is not None]
        pressure = sum(pressures) / len(pressures) if pressures else 0.0
        current, requests = context.current_num_replicas, context.total_num_requests
        wanted = desired_replicas(current, requests, pressure, self._target_requests, self._target_pressure)
        return wanted, {}


def desired_replicas(
    current: int, requests: float, pressure: float, target_requests: float, target_pressure: float
) -> int:
    """requests: that there are in all; pressure: the mean part of the places for adapters on a device that requests
    use. Each of them alone asks for so many replicas that its target is met; the larger number counts."""
    by_requests = requests / target_requests
    by_pressure = current * pressure / target_pressure
    return max(1, math.ceil(max(by_requests, by_pressure) - 1e-9))
