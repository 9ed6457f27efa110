"""The requests in one replica of the trunk or a decoder: at work, waiting, refused."""

import asyncio
import logging

import pytest

from lumen_ray.serve.http import Overloaded
from lumen_ray.serve.job import TrunkJob, TrunkReply
from lumen_ray.serve.room import Room
from lumen_ray.serve.settings import ModelDeployment, TrunkDeployment
from lumen_ray.serve.versions import DecoderVersions, TrunkVersions

JOB = TrunkJob(None, (), 1)


class Replica:
    """A trunk or decoder whose requests end when they are let go, one by one."""

    def __init__(self):
        self.now = self.most = self.done = 0
        self.free = asyncio.Semaphore(0)

    def reconfigure(self, settings):
        pass

    async def link(self, job):
        self.now += 1
        self.most = max(self.most, self.now)
        await self.free.acquire()
        self.now -= 1
        self.done += 1
        return TrunkReply(())

    async def link_streaming(self, job):
        yield await self.link(job)

    async def decode(self, output, requests, sender):
        await self.link(JOB)
        return []


def deployment(kind, replica, ongoing, queued):
    """A deployment's replica as Serve makes it, with the settings that Serve would give it."""
    made = object.__new__(kind)
    made._held, made.newest = {"1": replica}, "1"
    section = {"max_ongoing_requests": ongoing, "max_queued_requests": queued, "batching": {"max_batch_size": 1}}
    made.reconfigure(TrunkDeployment.model_validate(section).options()["user_config"])
    return made


async def _streamed(trunk):
    return [piece async for piece in trunk.link_streaming(JOB)]


CALLS = {
    "link": (TrunkVersions, lambda made: made.link(JOB)),
    "stream": (TrunkVersions, _streamed),
    "decode": (DecoderVersions, lambda made: made.decode(None, ())),
}


async def _settle():
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", CALLS)
def test_a_replica_works_on_some_lets_some_wait_and_refuses_the_rest(name):
    async def ask() -> tuple[Replica, list[int], list[object]]:
        kind, call = CALLS[name]
        replica = Replica()
        made = deployment(kind, replica, ongoing=2, queued=3)
        tasks = [asyncio.create_task(call(made)) for _ in range(9)]
        await _settle()
        working = [replica.now]
        for _ in range(3):  # one that waits begins as soon as another one is done
            replica.free.release()
            await _settle()
            working.append(replica.now)
        for _ in range(9):
            replica.free.release()
        return replica, working, await asyncio.gather(*tasks, return_exceptions=True)

    replica, working, answers = asyncio.run(ask())
    assert working == [2, 2, 2, 2] and replica.most == 2
    assert replica.done == 5 and [isinstance(answer, Overloaded) for answer in answers] == [False] * 5 + [True] * 4


def test_one_who_leaves_makes_room():
    async def ask() -> int:
        room = Room(1, 1)
        async with room.place():

            async def wait() -> None:
                async with room.place():
                    raise AssertionError("there was no room")

            waiting = asyncio.create_task(wait())
            await _settle()
            assert room.inside == 2
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return room.inside

    assert asyncio.run(ask()) == 1


@pytest.mark.parametrize("queued", [0, 64, -1])
@pytest.mark.parametrize("kind", [ModelDeployment, TrunkDeployment])
def test_serve_keeps_no_request_from_a_replica(kind, queued):
    """Those that wait in a router are looked after every half second, and a replica that is done with its own idles."""
    options = kind(max_ongoing_requests=16, max_queued_requests=queued).options()
    inside = 16 + (queued if queued >= 0 else 1000)
    assert options["max_ongoing_requests"] > inside and options["max_queued_requests"] > 1000


def test_any_number_may_wait():
    async def ask() -> int:
        room, free = Room(1, -1), asyncio.Event()

        async def wait() -> None:
            async with room.place():
                await free.wait()

        tasks = [asyncio.create_task(wait()) for _ in range(500)]
        await _settle()
        inside = room.inside
        free.set()
        await asyncio.gather(*tasks)
        return inside

    assert asyncio.run(ask()) == 500


def test_refusals_are_not_logged_with_their_traceback(caplog):
    Room(1, 0)
    log = logging.getLogger("ray.serve")
    with caplog.at_level(logging.ERROR, "ray.serve"):
        log.addHandler(caplog.handler)
        for error in (Overloaded("full"), RuntimeError("a bug")):
            log.error("Request failed.", exc_info=error)
        log.removeHandler(caplog.handler)
    assert {str(record.exc_info[1]) for record in caplog.records} == {"a bug"}
