"""``python -m opsin.server``: a replica, on a socket that only the door reaches. Started by the door only."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection

from opsin.rank.placement import place_ranks
from opsin.server.logs import set_up
from opsin.server.replicas.job import Job
from opsin.server.run import serve
from opsin.server.settings import Listen


def main() -> None:
    """Be a replica; arguments are two file descriptors: the job, and a pipe that ends with the door."""
    job_end, alive = (int(text) for text in sys.argv[1:3])
    threading.Thread(target=_end_with_door, args=(alive,), daemon=True).start()
    with Connection(job_end) as connection:
        job: Job = connection.recv()
    set_up(job.settings.log_level, job.settings.log_format)
    for noisy in ("httpx2", "opsin.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    place = place_ranks(job.count)[job.number]
    if place.cpus:
        os.sched_setaffinity(0, place.cpus)  # before torch counts cores and starts threads
    logging.getLogger(__name__).info("replica %d of %d: %s", job.number, job.count, place)
    config = replace(job.config, device=_device(job), host_shares=job.count)
    sys.exit(serve(config, job.settings, Listen(uds=job.socket)))


def _device(job: Job) -> str:
    """Replicas on chips have those one after another; on the CPU they share it."""
    from opsin.plugins import load_plugins

    spec, index, _ = load_plugins(prefer=job.config.prefer).select_device(job.config.device)
    if spec.torch_type != "cpu":
        index += job.number * job.config.tensor_parallel_size
    return f"{spec.name}:{index}"


def _end_with_door(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


main()
