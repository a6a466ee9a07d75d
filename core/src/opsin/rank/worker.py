"""A rank other than the first, in a process of its own: what ``python -m opsin.rank`` runs.

The engine passes three file descriptors: a connection with work, a pipe whose other end only it holds, and
memory that all ranks share. When that pipe ends, the engine is gone, however it went, and so is this process.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from opsin.api import Device, Parallel, RankLink
from opsin.config import EngineConfig
from opsin.errors import DeviceLostError
from opsin.rank.placement import Placement
from opsin.rank.step import Encoded, EncodeInput


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank is told first.

    Attributes:
        config: the engine's, with this rank's device.
        rank, world_size: its place.
        placement: its cores.
        port: of the store where ranks meet.
        log_level: of the engine's process.
    """

    config: EngineConfig
    rank: int
    world_size: int
    placement: Placement
    port: int
    log_level: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended: the error's class, by name, and its text."""

    kind: str
    text: str


def send(connection: Connection, message: Any) -> None:
    """Send a message by plain pickle: a connection's own would pass tensors as files that both ends open."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def meeting_store(port: int, timeout: float) -> Any:
    """The store where ranks meet, over loopback; port 0 opens one, whose ``port`` says where."""
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs do not export it
        "127.0.0.1",
        port,
        is_master=port == 0,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def join(device: Device, place: Parallel, store: Any, timeout: float) -> None:
    """Give the ranks' link its process group, over the device's own backend.

    Gloo groups are objects of their own, of which a process may have several; any other backend's is
    torch.distributed's default group.

    Raises:
        DeviceLostError: the ranks do not meet.
    """
    import torch.distributed as dist

    assert place.link is not None
    backend, limit = device.capabilities.communication, timedelta(seconds=timeout)
    rank, world = place.rank, place.world_size
    try:
        with _over_loopback():
            if backend == "gloo":
                place.link.group = dist.ProcessGroupGloo(store, rank, world, timeout=limit)
            else:
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise DeviceLostError(f"ranks cannot meet over {backend}: {error}") from error


@contextmanager
def _over_loopback() -> Iterator[None]:
    """Gloo otherwise takes the interface of the machine's name, which may have no address at all."""
    import socket

    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or "lo" not in {interface for _, interface in socket.if_nameindex()}:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


class _FollowingRank:
    """The messages of a rank: to the engine what it has come to, from there what comes next."""

    def __init__(self, work: Connection, memory: int, job: Job) -> None:
        from opsin.checkpoint import files
        from opsin.plugins import load_plugins
        from opsin.rank.local import Rank

        timeout = job.config.tensor_parallel_timeout
        # The engine's end is watched by a thread of its own: there is nothing to check while waiting.
        link = RankLink(memory=memory, own_cores=job.placement.alone, check=lambda: None, timeout=timeout)
        place = Parallel(rank=job.rank, world_size=job.world_size, link=link)

        class Following(Rank):
            """Says what it has come to."""

            def _join(self) -> None:
                work.send("open")
                work.recv()
                store = meeting_store(job.port, timeout)
                join(self.device, place, store, timeout)

            def _least(self, free_bytes: int) -> int:
                work.send(free_bytes)
                least: int = work.recv()
                return least

        config = job.config
        plugins = load_plugins(prefer=config.prefer)
        self._work = work
        self._rank = Following(config, files.load(config.model, config.revision), plugins, place)

    def run(self) -> None:
        """Compute steps and encode media until there are no more."""
        self._work.send("ready")
        while (given := self._work.recv()) is not None:
            if isinstance(given, EncodeInput):
                send(self._work, self._encoded(given))
            else:
                self._rank.compute(given)

    def _encoded(self, given: EncodeInput) -> Encoded:
        """What cannot be encoded fails by itself, as it does on rank 0."""
        try:
            outputs = self._rank.encode(given.modality, given.items)
        except DeviceLostError:
            raise
        except Exception as error:
            return Encoded(error=f"{type(error).__name__}: {error}")
        return Encoded(outputs=[output.to("cpu", copy=True) for output in outputs])


def main() -> None:
    """Be a rank; arguments are the three file descriptors. Ends the process."""
    work, alive, memory = (int(text) for text in sys.argv[1:4])
    threading.Thread(target=_end_with_engine, args=(alive,), daemon=True).start()
    connection = Connection(work)
    status = 1
    try:
        job: Job = connection.recv()
        if job.placement.cpus:
            os.sched_setaffinity(0, job.placement.cpus)  # before torch counts cores and starts threads
        logging.basicConfig(
            level=max(job.log_level, logging.WARNING), format="%(levelname)s %(name)s: %(message)s"
        )
        _FollowingRank(connection, memory, job).run()
        status = 0
    except EOFError:
        status = 0  # the engine has ended
    except BaseException as error:
        logging.getLogger(__name__).debug("this rank fails", exc_info=True)
        with suppress(OSError):
            connection.send(Failure(kind=type(error).__name__, text=str(error) or type(error).__name__))
    sys.stderr.flush()
    os._exit(status)  # nothing of the interpreter's or the group's end may keep the device busy


def _end_with_engine(alive: int) -> None:
    while os.read(alive, 1):
        time.sleep(0)
    os._exit(1)
