"""How many replicas a cluster should have: so many that neither requests nor their adapters crowd any of them.

Pure. Delays, bounds and smoothing are Serve's, which calls `desired_replicas` by way of `ray_app.py`.
"""

import math


def desired_replicas(
    current: int, requests: float, pressure: float, target_requests: float, target_pressure: float
) -> int:
    """requests: that there are in all; pressure: the mean part of the places for adapters on a device that requests
    use. Each of them alone asks for so many replicas that its target is met; the larger number counts."""
    by_requests = requests / target_requests
    by_pressure = current * pressure / target_pressure
    return max(1, math.ceil(max(by_requests, by_pressure) - 1e-9))
