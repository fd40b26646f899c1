"""Several engines as one service: which replica a request goes to, and one registry for all of them.

Where is decided here, how a request is served is not: every replica is a whole server with an engine of its own.
Ray Serve (the extra `ray`) starts replicas, scales and replaces them; nothing of Ray is imported before it is used.
"""

from collections.abc import Mapping
from typing import Any


def build_app(config: Mapping[str, Any]) -> Any:
    """The application that `ray.serve.run` takes, of what `cluster.yaml` says. Raises ConfigError, also where the
    extra `ray` is not installed."""
    from multilora.cluster.cluster_config import ClusterConfig
    from multilora.cluster.running import application_of

    return application_of(ClusterConfig.make(config))
