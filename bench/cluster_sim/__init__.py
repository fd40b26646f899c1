"""A cluster in simulation: the router and the scheduling policies of the package, on engines that only take time.

    python -m bench.cluster_sim --replicas 100 --adapters 10000 --out bench/results/cluster-sim.json

Discrete events. What a step and a load take is measured (`calibration.py`); what is simulated of an engine is in
`engine.py`, of its clients in `trace.py`, of the routers in `routing.py`.
"""
