"""What `multilora cluster` does."""

import logging

from multilora.cli.cluster.args import ClusterArgs
from multilora.cluster.cluster_config import ClusterConfig
from multilora.errors import ConfigError

logger = logging.getLogger(__name__)


def run(args: ClusterArgs) -> int:
    """Serve until a signal. Returns the exit code: 2 for a wrong file, or where the extra is not installed."""
    from multilora.cluster import running

    try:
        config = ClusterConfig.read(args.config)
        return 0 if args.check else running.run(config)
    except ConfigError as e:
        logger.error("cannot start: %s", e)
        return 2
