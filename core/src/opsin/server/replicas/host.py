"""The processes behind the door: started, watched, started again."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any, NoReturn

import httpx2

from opsin.config import EngineConfig
from opsin.errors import OpsinError
from opsin.server.http.errors import ApiError
from opsin.server.replicas.job import Job
from opsin.server.replicas.routing import choose
from opsin.server.replicas.totals import Totals
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_METRICS_S = 1.0
_BACKOFF_S = (1, 2, 4, 8, 16, 30)
_END_S = 5.0
_RETRY_LOADING_S = 5


class ReplicaClient(httpx2.AsyncClient):
    """A client whose process may end between the choice of a replica and the request to it."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """As of any client; when closed an `httpx2.HTTPError`, as if the process ended a moment later."""
        if self.is_closed:
            raise httpx2.ConnectError("the replica has ended", request=request)
        return await super().send(request, **options)


class Replica:
    """One process, its connection pool, and how many requests it has.

    Attributes:
        number: its place among the replicas.
        load: requests that it has at the moment.
        ready: whether it answers.
        was_ready: whether it ever did.
        client: sends it requests.
    """

    def __init__(self, job: Job) -> None:
        self.number, self.load = job.number, 0
        self.ready = self.was_ready = False
        self.client = ReplicaClient(
            transport=httpx2.AsyncHTTPTransport(
                uds=job.socket, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64)
            ),
            base_url="http://replica",
            timeout=httpx2.Timeout(None, connect=10),
        )
        mine, theirs = Pipe()
        their_end, self._alive = os.pipe()
        descriptors = [theirs.fileno(), their_end]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opsin.server", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is the door's
        )
        theirs.close()
        os.close(their_end)
        with mine, suppress(OSError):  # a process that has ended already is noticed soon
            mine.send(job)
        assert self.process.stdout is not None
        threading.Thread(target=_tell, args=(self.number, self.process.stdout), daemon=True).start()

    async def close(self) -> None:
        """Close connections to a process that has ended."""
        await self.client.aclose()
        os.close(self._alive)

    def ended(self) -> str | None:
        """How the process ended, None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


class ReplicaHost:
    """Holds the replicas, as `opsin.server.engine_host.EngineHost` holds an engine.

    Attributes:
        config: settings of the engines.
        totals: their metrics.
    """

    def __init__(self, config: EngineConfig, settings: ServerSettings) -> None:
        self.config = config
        self._failure: BaseException | None = None
        self.totals = Totals()
        self._count = settings.data_parallel_size
        # What the door does, replicas need not do again.
        self._settings = replace(
            settings, api_key=(), root_path="", ui=False, allowed_origins=(), data_parallel_size=1
        )
        self._folder = Path(tempfile.mkdtemp(prefix="opsin-replicas-"))  # readable by this user only
        self._replicas: dict[int, Replica] = {}
        self._watching: list[asyncio.Task[None]] = []
        self._starts = 0

    @property
    def failure(self) -> BaseException | None:
        """Why there are no replicas; None while all is well."""
        return self._failure

    def engine(self) -> NoReturn:
        """There is no engine in this process."""
        raise ApiError(503, "the replicas have the engines")

    @property
    def loading(self) -> bool:
        """Nothing is loaded in this process."""
        return False

    @property
    def ready(self) -> list[Replica]:
        """The replicas that answer."""
        return [replica for replica in self._replicas.values() if replica.ready]

    def start(self) -> None:
        """Start all replicas. On the event loop."""
        for number in range(self._count):
            self._watching.append(asyncio.get_running_loop().create_task(self._keep(number)))
        self._watching.append(asyncio.get_running_loop().create_task(self._poll_metrics()))

    def pick(self, key: bytes, without: Collection[Replica] = ()) -> Replica:
        """The replica for a request.

        Raises:
            ApiError: 503: there is none at the moment.
        """
        if self.failure is not None:
            raise ApiError(503, "the replicas have failed; the server has to restart")
        able = {replica.number: replica for replica in self.ready if replica not in without}
        if not able:
            raise ApiError(503, "the model is loading", retry_after_s=_RETRY_LOADING_S)
        return able[choose(key, {number: replica.load for number, replica in able.items()})]

    def lost(self, replica: Replica) -> None:
        """A replica does not answer: it gets no further requests until it is there again."""
        replica.ready = False

    def close(self) -> None:
        """End all replicas: in good order, or after some seconds by force."""
        for task in self._watching:
            task.cancel()
        for replica in self._replicas.values():
            if replica.process.poll() is None:
                replica.process.terminate()
        deadline = time.monotonic() + _END_S
        for replica in self._replicas.values():
            try:
                replica.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                replica.process.kill()
                replica.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- one replica's life -------------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Start a replica, and again whenever it ends. One that cannot start at first ends the server."""
        failures, was_ready = 0, False
        while True:
            replica = self._started(number)
            how = await self._until_ended(replica)
            was_ready = was_ready or replica.was_ready
            failures = 0 if replica.was_ready else failures + 1
            self.totals.ended(number)
            await replica.close()
            if not was_ready:
                self._failure = OpsinError(f"replica {number} could not start: it ended {how}; see above")
                return
            wait_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            logger.error("replica %d ended %s; it is started again in %d s", number, how, wait_s)
            await asyncio.sleep(wait_s)

    def _started(self, number: int) -> Replica:
        self._starts += 1
        job = Job(
            config=self.config,
            settings=self._settings,
            number=number,
            count=self._count,
            socket=str(self._folder / f"{self._starts}.sock"),
        )
        self._replicas[number] = Replica(job)
        return self._replicas[number]

    async def _until_ended(self, replica: Replica) -> str:
        while (how := replica.ended()) is None:
            if not replica.ready:
                replica.ready = await self._answers(replica)
                if replica.ready:
                    replica.was_ready = True
                    logger.info("replica %d is ready (process %d)", replica.number, replica.process.pid)
            await asyncio.sleep(_LOOK_S)
        replica.ready = False
        return how

    async def _answers(self, replica: Replica) -> bool:
        try:
            response = await replica.client.get("/ready", timeout=5)
        except httpx2.HTTPError:
            return False
        return response.status_code == 200

    async def _poll_metrics(self) -> None:
        """Often, so that little is lost of what an ending replica had counted."""
        while True:
            await self.read_metrics()
            await asyncio.sleep(_METRICS_S)

    async def read_metrics(self) -> None:
        """Ask all replicas for their metrics."""
        for replica in self.ready:
            with suppress(httpx2.HTTPError):
                response = await replica.client.get("/metrics", timeout=5)
                self.totals.take(replica.number, response.text)


def _tell(number: int, output: IO[bytes]) -> None:
    """Copy what a replica writes, line by line, with its number in front."""
    with suppress(OSError, ValueError):
        for line in output:
            text = line.decode(errors="replace").rstrip()
            if not text.startswith("opsin: listening on"):
                sys.stderr.write(f"[replica {number}] {text}\n")
