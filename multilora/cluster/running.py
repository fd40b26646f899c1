"""`multilora cluster`: the application on a Ray cluster, until a signal.

It joins the cluster that RAY_ADDRESS names (`auto`: the one that this machine is part of), else it starts one of this
machine alone. Called by `cli/cluster/command.py`.
"""

import logging
import os
import signal
import threading
from typing import Any

from multilora.cluster.cluster_config import NAME, ClusterConfig
from multilora.errors import ConfigError

logger = logging.getLogger(__name__)

PROXY_SECONDS = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"
"""How long Ray Serve waits for its HTTP proxy, three times, before it kills it and fails to start. Its own 5 s are
too few where the proxy's imports meet a busy machine. It counts where Ray is started from here, unless it is set."""


def application_of(config: ClusterConfig) -> Any:
    """See `build_app`. Comes before anything else that imports Ray Serve, which reads its settings once."""
    os.environ.setdefault(*PROXY_SECONDS)
    try:
        from multilora.cluster.ray_app import application
    except ImportError as e:
        raise ConfigError(f"a cluster needs Ray Serve (pip install 'multilora[ray]'): {e}") from None
    return application(config)


def start(config: ClusterConfig) -> None:
    """Serve it, in place of what was served before; returns once it is ready. What has not changed goes on, replicas
    that have are replaced one after the other."""
    app = application_of(config)
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(app, name=NAME, route_prefix="/")
    logger.info("ready: http://%s:%d", config.host, config.port)


def run(config: ClusterConfig) -> int:
    """`start`, and end all of it at SIGTERM or SIGINT, after what runs has ended. Returns the exit code."""
    from ray import serve

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    start(config)
    stopped.wait()
    logger.info("stopping")
    serve.shutdown()
    return 0
