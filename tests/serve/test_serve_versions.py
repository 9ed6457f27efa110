"""A model folder that changes while it is served, without Ray: what replicas hold, and when the ingress goes over."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from lumen_ray.errors import UserError
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import load_model, save_model
from lumen_ray.serve.job import TrunkJob
from lumen_ray.serve.one_process import kept
from lumen_ray.serve.reload import Reloads
from lumen_ray.serve.settings import TrunkDeployment
from lumen_ray.serve.versions import DecoderVersions, OtherVersion, TrunkVersions

REQUEST = dataclasses.replace(make_request("detect", classes=["red circle"]), score_threshold=0.0, max_per_phrase=3)
JOB = TrunkJob(np.zeros((96, 128, 3), np.uint8), (REQUEST,), 6)


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def replicas(folder, monkeypatch):
    monkeypatch.setattr("lumen_ray.serve.trunk._in_object_store", kept)
    trunk, decoder = TrunkVersions(str(folder), "cpu", {}), DecoderVersions(str(folder), "lumen", "cpu")
    for replica in (trunk, decoder):
        replica.reconfigure(TrunkDeployment().user_config)
    return trunk, decoder


def publish(folder):
    """Saves another version, whose name is returned, over the one in a folder."""
    loaded = load_model(folder)
    state = {name: 1.01 * tensor for name, tensor in loaded.model.state_dict().items()}
    save_model(folder, state, loaded.settings, loaded.tokenizer, loaded.meta)
    return load_model(folder).version


def test_a_request_is_answered_by_one_version_while_the_folder_changes(replicas, folder):
    trunk, decoder = replicas
    first, second = trunk.newest, publish(folder)

    async def ask():
        old = await trunk.link(dataclasses.replace(JOB, version=first))
        found = [await replica.update(first) for replica in replicas]
        new = await trunk.link(dataclasses.replace(JOB, version=second))
        both = [await decoder.decode(reply.output, (REQUEST,), "", reply.version) for reply in (old, new)]
        again = await trunk.link(dataclasses.replace(JOB, version=first))
        await decoder.drop(first)
        with pytest.raises(OtherVersion, match=f"holds version {second}, not {first}"):
            await decoder.decode(again.output, (REQUEST,), "", again.version)
        return [old.version, found[0], found[1], new.version, again.version], both, await trunk.info(second)

    versions, answers, info = asyncio.run(ask())
    assert versions == [first, second, second, second, first] and info["version"] == second
    assert all(len(answer.predictions) == 1 for (answer,) in answers)


def test_a_trunk_that_does_not_hold_a_version_answers_with_its_newest(replicas):
    trunk, _ = replicas
    reply = asyncio.run(trunk.link(dataclasses.replace(JOB, version="gone")))
    assert reply.version == trunk.newest


def test_a_request_that_names_a_version_is_answered_by_no_other(replicas):
    trunk, _ = replicas
    named = dataclasses.replace(JOB, version=trunk.newest, is_pinned=True)
    assert asyncio.run(trunk.link(named)).model == f"nano@{trunk.newest}"
    gone = dataclasses.replace(named, version="gone")
    for call in (trunk.link(gone), anext(trunk.link_streaming(gone))):
        with pytest.raises(UserError, match="'gone' of the model is not served any more; models: nano") as caught:
            asyncio.run(_awaited(call))
        assert caught.value.reason == "unknown_model"


async def _awaited(call):
    return await call


def test_an_unchanged_folder_is_not_loaded_again(replicas, monkeypatch):
    trunk, _ = replicas
    monkeypatch.setattr(trunk, "_load", None)
    assert asyncio.run(trunk.update(trunk.newest)) == trunk.newest


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_an_incomplete_folder_is_refused_and_the_old_version_goes_on(replicas, folder, name):
    (folder / name).rename(folder / "aside")
    for replica in replicas:
        error = asyncio.run(replica.update(replica.newest))
        assert isinstance(error, UserError) and f"{name} is missing" in str(error)
    assert asyncio.run(replicas[0].link(JOB)).version == replicas[0].newest
    (folder / "aside").rename(folder / name)
    assert asyncio.run(replicas[0].update(replicas[0].newest)) == replicas[0].newest


def test_damaged_weights_are_refused(replicas, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for replica in replicas:
        error = asyncio.run(replica.update(replica.newest))
        assert isinstance(error, UserError) and error.reason == "damaged_model"


def test_a_link_that_moves_is_another_version(folder, tmp_path):
    latest, other = tmp_path / "latest", shutil.copytree(folder, tmp_path / "other")
    latest.symlink_to(folder)
    trunk = TrunkVersions(str(latest), "cpu", {})
    second = publish(other)
    (tmp_path / "next").symlink_to(other)
    os.replace(tmp_path / "next", latest)
    assert asyncio.run(trunk.update(trunk.newest)) == second


class Replicas:
    """A deployment as the ingress sees it: `says` is what its replicas answer to `update`."""

    def __init__(self, *says):
        self.says, self.calls = says, []

    def broadcast(self, method, *arguments):
        self.calls.append((method, *arguments))

        async def results_async(return_exceptions):
            return [None] * len(self.says) if method == "drop" else list(self.says)

        return SimpleNamespace(results_async=results_async)


def looked(folder, *deployments, version="old"):
    """The state of an ingress replica after a look at a folder that has changed, and after a second one."""
    switched = []
    handles = dict(enumerate(deployments))
    reloads = Reloads(str(folder), handles, keep_s=0, on_switch=lambda: switched.append(1))
    reloads.version = version

    async def look():
        await reloads.look()
        await asyncio.gather(*reloads._settling)
        await reloads.look()

    asyncio.run(look())
    return reloads, len(switched)


def test_requests_go_over_once_every_replica_holds_the_new_version(folder):
    trunk, decoder = Replicas("new"), Replicas("new", "new")
    reloads, switched = looked(folder, trunk, decoder)
    assert (reloads.version, reloads.refused, switched) == ("new", None, 1)
    assert trunk.calls == decoder.calls == [("update", "old"), ("drop", "old")]


def test_what_one_replica_refuses_is_not_served_and_dropped_everywhere(folder, caplog):
    trunk, decoder = Replicas("new"), Replicas("new", UserError("it is damaged", "damaged_model"))
    reloads, switched = looked(folder, trunk, decoder)
    assert (reloads.version, reloads.refused, switched) == ("old", "it is damaged", 0)
    assert trunk.calls == decoder.calls == [("update", "old"), ("drop", "new")]


def test_versions_that_differ_between_nodes_are_refused(folder):
    reloads, switched = looked(folder, Replicas("new"), Replicas("other"))
    assert reloads.version == "old" and "several versions" in reloads.refused and not switched


def test_a_replica_that_dies_while_it_loads_is_asked_again(folder):
    trunk = Replicas(RuntimeError("died"))
    reloads, switched = looked(folder, trunk)
    assert (reloads.version, reloads.refused, switched) == ("old", None, 0)
    assert trunk.calls == [("update", "old")] * 2


def test_a_version_published_before_the_first_request_is_served_from_then_on(folder):
    trunk = Replicas("new")
    reloads, _ = looked(folder, trunk, version="")
    assert trunk.calls == []
    reloads.version = "old"
    asyncio.run(reloads.look())
    assert reloads.version == "new" and trunk.calls[0] == ("update", "old")


def test_an_incomplete_folder_reaches_no_replica(folder):
    (folder / "model.safetensors").unlink()
    trunk = Replicas("new")
    reloads, _ = looked(folder, trunk)
    assert "model.safetensors is missing" in reloads.refused and trunk.calls == []


def test_a_version_that_is_dropped_leaves_the_memory(replicas, folder):
    decoder = replicas[1]
    first, second = decoder.newest, publish(folder)

    async def change():
        await decoder.update(first)
        gone = weakref.ref(decoder._held[first].stage)
        await decoder.drop(first)
        await decoder.drop(second)
        return gone(), list(decoder._held)

    assert asyncio.run(change()) == (None, [second])
