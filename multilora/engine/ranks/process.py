"""A rank's process: `python -m multilora.engine.ranks.process DIRECTORY RANK PARENT`. Started by `lead.py`.

It ends when rank 0 says so, when it fails, and when process PARENT, in which rank 0 runs, is gone.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time

import torch
import zmq

from multilora import logs
from multilora.config import Config
from multilora.engine.ranks.follow import follow

PARENT_CHECK_SECONDS = 0.5


def main(directory: str, rank: int, parent: int) -> None:
    """Serve, and end the process at once: a communicator whose peers are gone would hold up an orderly end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; rank 0 decides when we stop
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.freeze()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    well = follow(context, directory, rank, lambda config: _set_up(config, rank))
    context.destroy(linger=2000)
    logging.shutdown()
    os._exit(0 if well else 1)


def _set_up(config: Config, rank: int) -> None:
    logs.setup(config.log_level, role=f"rank {rank}", form=config.log_format)
    divide_cores(config.tp_size)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def divide_cores(ranks: int) -> None:
    """On CPU every rank computes with its share of the cores; where there are more than two, the front has one. What
    somebody has set as OMP_NUM_THREADS stays as it is."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    torch.set_num_threads(max(1, (cores - 1 if cores > 2 else cores) // ranks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
