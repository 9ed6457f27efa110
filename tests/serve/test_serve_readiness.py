"""A deployment that is merely overloaded stays ready; one that is gone, stuck or silent does not."""

from __future__ import annotations

import asyncio

import pytest

from lumen_ray.serve.readiness import Ping, Readiness


class Deployment:
    """`pings`: what the next ones say; None waits for ever."""

    def __init__(self, *pings: Ping | None):
        self.pings, self.sent, self.is_running, self.now = list(pings), 0, True, 100.0
        self.readiness = Readiness(self.ping, self.running, patience_s=60, wait_s=0.02, clock=lambda: self.now)

    async def ping(self):
        self.sent += 1
        found = self.pings.pop(0)
        if found is None:
            await asyncio.Event().wait()
        return found

    async def running(self):
        return self.is_running


@pytest.mark.parametrize("full", [Ping.BUSY, None], ids=["refused", "waiting"])
def test_a_full_queue_of_a_deployment_that_answers_is_ready(full):
    async def check():
        busy = Deployment(full, full)
        before = await busy.readiness.check()  # nothing was ever answered
        busy.readiness.answered()
        after = await busy.readiness.check()
        busy.now += 61
        busy.pings += [full]
        silent = await busy.readiness.check()
        return before, after, silent

    assert asyncio.run(check()) == (False, True, False)


def test_a_full_deployment_without_replicas_is_not_ready():
    async def check():
        lost = Deployment(None)
        lost.readiness.answered()
        lost.is_running = False
        return await lost.readiness.check()

    assert asyncio.run(check()) is False


def test_one_that_has_died_is_not_ready_however_lately_it_answered():
    async def check():
        dead = Deployment(Ping.GONE)
        dead.readiness.answered()
        return await dead.readiness.check()

    assert asyncio.run(check()) is False


def test_pings_of_a_model_that_does_not_get_on_are_no_answers():
    async def check():
        stuck = Deployment(Ping.FINE, Ping.STUCK, Ping.STUCK)
        first = await stuck.readiness.check()
        alone = await stuck.readiness.check()
        stuck.readiness.answered()  # by another replica
        return first, alone, await stuck.readiness.check()

    assert asyncio.run(check()) == (True, False, True)


def test_pings_do_not_pile_up():
    async def check():
        full = Deployment(None, None, None)
        await asyncio.gather(*(full.readiness.check() for _ in range(5)))
        await full.readiness.check()
        return full.sent

    assert asyncio.run(check()) == 1
