"""How the ingress calls the deployments: which ones, what travels, and what a lost replica or a full queue becomes.

No Ray runs here: handles are stand-ins whose `remote` gives an awaitable, as Serve's do.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from support.serve_fakes import fake_answer

from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.inference.request import make_request
from lumen_ray.serve.http import Overloaded, Unavailable
from lumen_ray.serve.ingress import ServeBackend
from lumen_ray.serve.job import TrunkReply
from lumen_ray.serve.settings import Http, ServeSettings
from lumen_ray.serve.versions import OtherVersion

IMAGE = np.zeros((16, 20, 3), np.uint8)
LINKED = TrunkReply((None,), ("lumen",), "reference")


def query(task="detect", **fields):
    if task == "detect":
        fields = {"classes": ["a"]}
    return make_request(task, **fields)


class Response:
    """An awaitable like Serve's: it fails or answers when awaited."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Method:
    def __init__(self, handle, name):
        self.handle, self.name = handle, name

    def remote(self, *args):
        self.handle.calls.append((self.name, args))
        outcomes = self.handle.outcomes.get(self.name, [True])
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        return Response(outcome)


class Handle:
    def __init__(self, **outcomes):
        self.outcomes = {name: list(values) for name, values in outcomes.items()}
        self.calls = []
        self.sessions = []

    def broadcast(self, name, *args):
        self.calls.append((name, args))

        async def results_async(return_exceptions):
            return ["a"]

        return SimpleNamespace(results_async=results_async)

    def options(self, session_id):
        self.sessions.append(session_id)
        return self

    def __getattr__(self, name):
        return Method(self, name)


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("method", "traceback", cause)


def infer(trunk, decoder, queries, **http):
    settings = ServeSettings(model="m", http=Http(**http))
    return asyncio.run(ServeBackend(trunk, {"lumen": decoder}, settings).infer(IMAGE, queries, 8))


def test_text_tasks_do_not_reach_the_decoder():
    answers = [fake_answer(query("caption"), (16, 20))]
    trunk, decoder = Handle(link=[TrunkReply(tuple(answers))]), Handle()
    assert infer(trunk, decoder, [query("caption")]) == answers
    assert [name for name, _ in trunk.calls] == ["link"] and decoder.calls == []


def test_a_chat_asks_the_decoder_that_was_routed_to_alone():
    """All decoders were asked, so that a plain question waited behind the pictures of others."""
    asked = query("chat", text="find a")
    said = fake_answer(query("caption"), (16, 20))
    for decoders, decoded in (((), [said]), (("lumen",), ["boxes"])):
        reply = TrunkReply((said if not decoders else None,), decoders, "reference" if decoders else None)
        trunk, lumen, pictures = Handle(link=[reply]), Handle(decode=[["boxes"]]), Handle()
        backend = ServeBackend(trunk, {"lumen": lumen, "pictures": pictures}, ServeSettings(model="m"))
        assert asyncio.run(backend.infer(IMAGE, [asked], 8)) == decoded
        assert (len(trunk.calls), len(lumen.calls), len(pictures.calls)) == (1, len(decoders), 0)


def test_a_decoder_gets_the_reference_and_only_missing_answers_come_from_it():
    queries = [query("caption"), query()]
    said = fake_answer(queries[0], (16, 20))
    trunk = Handle(link=[TrunkReply((said, None), ("lumen",), "reference")])
    decoder = Handle(decode=[["again", "boxes"]])
    assert infer(trunk, decoder, queries) == [said, "boxes"]
    assert decoder.calls == [("decode", ("reference", tuple(queries), "", ""))]


def test_images_of_examples_go_to_the_trunk_alone():
    trunk, decoder = Handle(link=[LINKED]), Handle(decode=[["answer"]])
    bolt = ClassByExample("bolt", [Example([1, 2, 8, 9], IMAGE)])
    infer(trunk, decoder, [make_request("detect", classes=["a", bolt])])
    ((_, (job,)),), ((_, (_, (sent,), *_)),) = trunk.calls, decoder.calls
    assert job.requests[0].examples["bolt"] is bolt and not sent.examples and sent.phrases == ("a", "bolt")


def upstream_died() -> RayServeException:
    """As of `ray.serve._private.router`, for a call whose argument is the response of a replica that died."""
    error = RayServeException("Request to deployment 'LumenDecoder' failed because an upstream actor died")
    error.__cause__ = ActorDiedError()
    return error


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), wrapped(ActorDiedError()), wrapped(wrapped(ActorDiedError())), upstream_died()],
)
def test_lost_replica_is_retried_once(error):
    trunk, decoder = Handle(link=[LINKED]), Handle(decode=[error, ["answer"]])
    assert infer(trunk, decoder, [query()]) == ["answer"]
    assert len(trunk.calls) == len(decoder.calls) == 2
    with pytest.raises(Unavailable):
        infer(Handle(link=[LINKED]), Handle(decode=[error]), [query()])


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (BackPressureError(9, 8), Overloaded),
        (wrapped(BackPressureError(9, 8)), Overloaded),
        (wrapped(Overloaded("full")), Overloaded),
        (wrapped(UserError("no such keypoint", "unknown_keypoint")), UserError),
        (DeploymentUnavailableError(None), Unavailable),
        (wrapped(RuntimeError("bug")), RayTaskError),
        (RayServeException("bug"), RayServeException),
    ],
)
def test_other_errors_are_not_retried(error, becomes):
    decoder = Handle(decode=[error, "answers"])
    with pytest.raises(becomes) as caught:
        infer(Handle(link=[LINKED]), decoder, [query()])
    assert len(decoder.calls) == 1
    if becomes is UserError:
        assert caught.value.reason == "unknown_keypoint"


def test_a_decoder_of_another_version_is_asked_again_once_all_hold_one(monkeypatch):
    """As often as it takes: no replica is lost."""
    monkeypatch.setattr("lumen_ray.serve.ingress._OTHER_VERSION_WAIT_S", 0)
    other = wrapped(OtherVersion("this replica holds version b, not a"))
    trunk, decoder = Handle(link=[LINKED], info=[{"version": "a"}]), Handle(decode=[other, other, other, ["answer"]])
    backend = ServeBackend(trunk, {"lumen": decoder}, ServeSettings(model="m", http=Http(retries=0)))

    async def ask():
        await backend.info()
        return await backend.infer(IMAGE, [query()], 8)

    assert asyncio.run(ask()) == ["answer"]
    assert [args[0].version for name, args in trunk.calls if name == "link"] == ["a"] * 4
    assert [args for name, args in decoder.calls if name == "update"] == [("a",)] * 3


def test_a_slow_model_times_out_and_its_call_is_cancelled():
    """Serve cancels calls only of requests whose client has left."""
    calls = []

    class Slow(Response):
        def __await__(self):
            calls.append(self)
            yield from asyncio.sleep(60).__await__()

    class Never(Handle):
        def __getattr__(self, name):
            return SimpleNamespace(remote=lambda *_: Slow(None))

    for trunk in (Never(), Handle(link=[LINKED])):
        with pytest.raises(TimeoutError):
            infer(trunk, Never(), [query()], request_timeout_s=0.05)
    assert [call.is_cancelled for call in calls] == [True, True]


def test_ready_asks_both_and_info_is_kept():
    trunk, decoder = Handle(info=[{"preset": "nano"}]), Handle(ping=[wrapped(ActorDiedError())])
    backend = ServeBackend(trunk, {"lumen": decoder}, ServeSettings(model="m"))

    async def both():
        return await backend.ready(), await backend.info(), await backend.info()

    ready, info, _ = asyncio.run(both())
    assert ready == {"trunk": True, "lumen": False} and info == {"preset": "nano"}
    assert [name for name, _ in trunk.calls].count("info") == 1


@pytest.mark.parametrize(
    ("running", "error", "is_ready"),
    [
        ({"RUNNING": 1}, BackPressureError(9, 8), True),
        ({"RUNNING": 1}, wrapped(BackPressureError(9, 8)), True),
        ({"STARTING": 1}, BackPressureError(9, 8), False),
        ({"RUNNING": 1}, DeploymentUnavailableError(None), False),
        ({"RUNNING": 1}, wrapped(ActorDiedError()), False),
    ],
)
def test_overload_of_a_trunk_that_answers_is_no_reason_not_to_be_ready(monkeypatch, running, error, is_ready):
    """Readiness was lost with a full queue, at all ingress replicas at once."""
    deployment = SimpleNamespace(replica_states=running, status="HEALTHY")
    application = SimpleNamespace(deployments={"Trunk": deployment})
    status = SimpleNamespace(applications={"lumen": application})
    monkeypatch.setattr("lumen_ray.serve.ingress.serve.status", lambda: status)
    trunk, decoder = Handle(link=[LINKED], ping=[error]), Handle(decode=[["answer"]])
    trunk.app_name, trunk.deployment_name = "lumen", "Trunk"
    backend = ServeBackend(trunk, {"lumen": decoder}, ServeSettings(model="m"))

    async def ready():
        before = await backend.ready()
        await backend.infer(IMAGE, [query()], 8)
        return before, await backend.ready()

    before, after = asyncio.run(ready())
    assert before == {"trunk": False, "lumen": True} and after == {"trunk": is_ready, "lumen": True}
