"""Rank 0 of several: in the engine's process, with the other ranks as processes behind it.

Sequences and sampling stay here, so what fails alone on one device fails alone with several. What crosses is
a `StepInput` per step, over a pipe, the step's embeddings, by the ranks' own collectives, and media where
there are several to encode. Whatever goes wrong between the ranks is final: `DeviceLostError`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from typing import IO, Any

import torch
from torch import Tensor

from opsin import errors
from opsin.api import MappedMedia, Modality, Parallel, RankLink
from opsin.checkpoint.files import Checkpoint
from opsin.config import EngineConfig
from opsin.errors import ConfigError, DeviceLostError, OpsinError, RequestError
from opsin.plugins import Plugins
from opsin.rank.local import Rank
from opsin.rank.placement import place_ranks
from opsin.rank.step import Embed, EncodeInput, StepInput, StepOutput, deal
from opsin.rank.worker import Failure, Job, join, meeting_store, send

logger = logging.getLogger(__name__)

_ENDING_S = 5.0
"""How long ranks may take to end by themselves."""

_WHY_S = 2.0
"""How long to wait for the reason, once it is plain that a rank is gone."""


class _Follower:
    """Another rank's process, and the connection to it."""

    def __init__(self, rank: int, memory: int | None, timeout: float) -> None:
        """Start the process. It imports while the engine goes on."""
        self.rank = rank
        self.work, theirs = Pipe()
        their_end, self._alive = os.pipe()
        # A rank that has stopped reading must not stop the engine for ever.
        bounded = socket.socket(fileno=os.dup(self.work.fileno()))
        bounded.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout) + 1, 0))
        bounded.close()
        passed = [theirs.fileno(), their_end, *([] if memory is None else [memory])]
        arguments = [str(theirs.fileno()), str(their_end), str(-1 if memory is None else memory)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opsin.rank", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            start_new_session=True,  # Ctrl-C is the engine's
        )
        theirs.close()
        os.close(their_end)
        assert self.process.stdout is not None
        threading.Thread(target=_tell, args=(rank, self.process.stdout), daemon=True).start()

    def receive(self, deadline: float) -> Any:
        """The next message.

        Raises:
            OpsinError: the rank has failed, with its error; or it is gone, or does not come.
        """
        while not self.work.poll(0.05):
            self.check()
            if time.monotonic() > deadline:
                raise DeviceLostError(f"rank {self.rank} says nothing")
        try:
            message = self.work.recv()
        except (EOFError, OSError):
            self._await_end()
            raise DeviceLostError(self.ended()) from None
        if isinstance(message, Failure):
            raise _error_of(self.rank, message)
        return message

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            DeviceLostError: the rank is gone, or does not read.
        """
        try:
            send(self.work, message)
        except (OSError, ValueError) as error:
            self._await_end()
            self.check()
            raise DeviceLostError(f"rank {self.rank} takes no more work: {error}") from error

    def check(self) -> None:
        """Raise the rank's error if its process has ended."""
        if self.process.poll() is None:
            return
        with suppress(EOFError, OSError):
            while self.work.poll():
                if isinstance(message := self.work.recv(), Failure):
                    raise _error_of(self.rank, message)
        raise DeviceLostError(self.ended())

    def ended(self) -> str:
        """How the process ended."""
        status = self.process.poll()
        if status is None:
            return f"rank {self.rank} (process {self.process.pid}) has closed its connection"
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"rank {self.rank} (process {self.process.pid}) ended {how}"

    def _await_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_WHY_S)

    def release(self) -> None:
        """Let the process end: there is no more work."""
        self.work.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def end(self, deadline: float) -> None:
        """Wait until the process has ended; kill it after the deadline."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LeadingRank(Rank):
    """Rank 0, which has the others compute what it computes."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, plugins: Plugins) -> None:
        """Start the other ranks, then load as `Rank` does, at the same time as they.

        Raises:
            OpsinError: as `Rank`, or a rank fails; the message says which.
        """
        world, timeout = config.tensor_parallel_size, config.tensor_parallel_timeout
        device = plugins.select_device(config.device)
        self._timeout = timeout
        self._lost: str | None = None
        self._memory = os.memfd_create("opsin-ranks") if hasattr(os, "memfd_create") else None
        self._placements = place_ranks(world)
        self._affinity = os.sched_getaffinity(0) if self._placements[0].cpus else None
        self._followers: list[_Follower] = []
        self._store: Any = None
        try:
            self._followers += (_Follower(rank, self._memory, timeout) for rank in range(1, world))
            self._store = meeting_store(0, timeout)
            spec, index, _ = device
            theirs = replace(config, model=str(checkpoint.path), revision=None)
            for follower in self._followers:
                # Ranks share the host's memory and cores; of anything else each has one of its own.
                number = index if spec.torch_type == "cpu" else index + follower.rank
                follower.send(
                    Job(
                        config=replace(theirs, device=f"{spec.name}:{number}"),
                        rank=follower.rank,
                        world_size=world,
                        placement=self._placements[follower.rank],
                        port=self._store.port,
                        log_level=logger.getEffectiveLevel(),
                    )
                )
            if self._placements[0].cpus:
                os.sched_setaffinity(0, self._placements[0].cpus)
            link = RankLink(
                memory=self._memory, own_cores=self._placements[0].alone, check=self.check, timeout=timeout
            )
            super().__init__(config, checkpoint, plugins, Parallel(rank=0, world_size=world, link=link))
            self._all_say("ready")
        except BaseException:
            self._end_followers()
            raise
        for rank, placement in enumerate(self._placements):
            logger.info("rank %d: %s", rank, placement)

    def compute(self, step: StepInput, embed: Embed | None = None) -> StepOutput:
        """See `Rank.compute`.

        Raises:
            DeviceLostError: a rank is gone or has failed; all of them are ended then.
        """
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        # First, and outside: embeddings that cannot be made fail a request, and no rank waits for them.
        assert embed is not None
        ids = torch.tensor(step.token_ids, dtype=torch.int64, device=self.device.torch_device)
        embeds = embed(ids)
        try:
            for follower in self._followers:
                follower.send(replace(step, token_ids=()))
            return super().compute(step, lambda _: embeds)
        except BaseException as error:
            lost = self._lost_with(error)
            if not isinstance(error, Exception):
                raise
            raise lost from error

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """See `Rank.encode`; several items are dealt to the ranks, which encode at the same time.

        Raises:
            RequestError: an item cannot be encoded; which one is not told.
            DeviceLostError: as `compute`.
        """
        if len(items) < 2 or self._lost is not None:
            return super().encode(modality, items)
        mine, *theirs = deal([item.num_embeds for item in items], self.place.world_size)
        try:
            asked = [(follower, dealt) for follower, dealt in zip(self._followers, theirs) if dealt]
            for follower, dealt in asked:
                follower.send(EncodeInput(modality=modality, items=[items[index] for index in dealt]))
        except DeviceLostError as error:
            raise self._lost_with(error) from error
        outputs: dict[int, Tensor] = {}
        failure: Exception | None = None
        try:
            outputs.update(zip(mine, super().encode(modality, [items[index] for index in mine]), strict=True))
        except DeviceLostError:
            raise
        except Exception as error:  # the others' answers have to be taken first
            failure = error
        try:
            for follower, dealt in asked:
                encoded = follower.receive(time.monotonic() + self._timeout)
                if encoded.error:
                    failure = failure or RequestError(encoded.error)
                else:
                    outputs.update(zip(dealt, encoded.outputs, strict=True))
        except OpsinError as error:
            raise self._lost_with(error) from error
        if failure is not None:
            raise failure
        target = self.device.torch_device
        return [outputs[index].to(target) for index in range(len(items))]

    def _lost_with(self, error: BaseException) -> DeviceLostError:
        """End all ranks, and say why."""
        self._lost = self._why(error)
        self._end_followers(patience=0)
        return DeviceLostError(self._lost)

    def check(self) -> None:
        """See `Rank.check`."""
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        for follower in self._followers:
            follower.check()

    def close(self) -> None:
        """See `Rank.close`; the other processes have ended afterwards."""
        super().close()
        self._end_followers()

    def _join(self) -> None:
        self._all_say("open")
        if self.device.capabilities.communication != "gloo" and torch.distributed.is_initialized():
            raise ConfigError(
                "torch.distributed has a default group in this process already: close the other engine with "
                "tensor_parallel_size, or run each engine in a process of its own"
            )
        for follower in self._followers:
            follower.send("join")
        join(self.device, self.place, self._store, self._timeout)

    def _least(self, free_bytes: int) -> int:
        # A rank may read its weights more slowly, from another disk or under a cold cache.
        deadline = time.monotonic() + max(self._timeout, 3600)
        least: int = min([free_bytes, *(follower.receive(deadline) for follower in self._followers)])
        for follower in self._followers:
            follower.send(least)
        return least

    def _all_say(self, expected: str) -> None:
        deadline = time.monotonic() + max(self._timeout, 600)
        for follower in self._followers:
            message = follower.receive(deadline)
            assert message == expected, f"rank {follower.rank} says {message!r}"

    def _why(self, error: BaseException) -> str:
        """What ended a step: the rank that is gone, if one is; here, it may only be the first to notice."""
        deadline = time.monotonic() + (0 if isinstance(error, (DeviceLostError, TimeoutError)) else _WHY_S)
        while True:
            try:
                self.check()
            except OpsinError as lost:
                return str(lost)
            if time.monotonic() > deadline:
                known = isinstance(error, (DeviceLostError, TimeoutError))
                return str(error) if known else f"rank 0: {type(error).__name__}: {error}"
            time.sleep(0.02)

    def _end_followers(self, patience: float = _ENDING_S) -> None:
        """End all other ranks, and what belongs to them here; kill those that stay for ``patience`` s."""
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.release()
        deadline = time.monotonic() + patience
        for follower in followers:
            follower.end(deadline)
        link = self.place.link if hasattr(self, "place") else None
        if link is not None and link.group is not None:
            link.group = None
        elif followers and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._store = None
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
        if self._affinity is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, self._affinity)


def _error_of(rank: int, failure: Failure) -> OpsinError:
    """A rank's error as one of this process: of the same class, if it is one of ours."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, OpsinError) and kind is not DeviceLostError:
        with suppress(TypeError):
            return kind(f"rank {rank}: {failure.text}")
    return DeviceLostError(f"rank {rank}: {failure.kind}: {failure.text}")


def _tell(rank: int, output: IO[bytes]) -> None:
    """Copy what a rank prints, line by line, with its number in front."""
    with suppress(OSError, ValueError):
        for line in output:
            sys.stderr.write(f"[rank {rank}] {line.decode(errors='replace').rstrip()}\n")
