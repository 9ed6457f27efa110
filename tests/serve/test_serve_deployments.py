"""The replicas of trunk and decoder without Ray: a shared pass gives what a pass alone gives, and one job's failure
does not reach the others."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import EXPERTS, tiny_folder

from lumen_ray import cancellation
from lumen_ray.errors import UserError
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import merge
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.serve.batching import MANY, Collector, map_grouped
from lumen_ray.serve.decoder import DecoderJob, DecoderReplica, load_decoder
from lumen_ray.serve.job import TrunkJob
from lumen_ray.serve.one_process import kept
from lumen_ray.serve.settings import TrunkDeployment
from lumen_ray.serve.trunk import TrunkReplica, load_trunk
from lumen_ray.structures import Region
from lumen_ray.trunk.turns import Turns
from lumen_ray.wire.limits import cost_of


def batching(**fields):
    """What Serve hands to `reconfigure`."""
    return {**TrunkDeployment().user_config, **fields}


def limited(task, threshold=0.0, limit=3, **fields):
    return dataclasses.replace(make_request(task, **fields), score_threshold=threshold, max_per_phrase=limit)


def job(seed, *requests, size=(96, 128), max_new_tokens=6):
    image = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    image.flags.writeable = False  # as it arrives from Ray's object store
    return TrunkJob(image, requests, max_new_tokens)


@pytest.fixture(scope="module")
def trunk(model_folder):
    return TrunkReplica(str(model_folder), "cpu", {})


@pytest.fixture(scope="module")
def decoder(model_folder):
    return DecoderReplica(str(model_folder), "lumen", "cpu")


@pytest.fixture(scope="module")
def jobs():
    region = Region("box", (64, 64), points=np.array([[3, 4], [40, 50]]))
    return [
        job(1, limited("detect", classes=["red circle", "blue square"]), limited("caption")),
        job(2, limited("pose", classes=["figure", "red circle"], keypoints=["head"], limit=2)),
        job(3, limited("region_caption", region=region), limited("segment", classes=["x"]), size=(64, 64)),
        job(4, limited("vqa", text="what ?"), max_new_tokens=3),
    ]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        a, b = a.to_dict(), b.to_dict()
        assert {k: v for k, v in a.items() if k != "instances"} == {k: v for k, v in b.items() if k != "instances"}
        for x, y in zip(a.get("instances", ()), b.get("instances", ()), strict=True):
            assert x["phrase"] == y["phrase"] and x["score"] == pytest.approx(y["score"], abs=1e-4)
            assert x["box"] == pytest.approx(y["box"], abs=1e-2)
            assert x.get("mask") == y.get("mask") and x.get("keypoints", {}).keys() == y.get("keypoints", {}).keys()


def test_shared_passes_give_what_the_engine_gives_alone(trunk, decoder, jobs, model_folder):
    outputs = pickle.loads(pickle.dumps(trunk.outputs(jobs)))
    answers = decoder.answers([DecoderJob(output, job.requests) for output, job in zip(outputs, jobs, strict=True)])
    engine = Engine.load(model_folder)
    for job, got in zip(jobs, answers, strict=True):
        same(got, engine.run([job.image], [job.requests], max_new_tokens=job.max_new_tokens)[0])
    assert len(answers[0][0].predictions[0]) > 0


def test_merge_undoes_select(trunk, jobs):
    outputs = [output for output in trunk.outputs(jobs) if output.decoder_inputs]
    merged = merge(outputs)
    assert len(merged.frames) == len(outputs) > 2 and len(merged.decoder_inputs["lumen"].link) == len(
        merged.decoder_inputs["lumen"].prompts
    )
    for row, output in enumerate(outputs):
        again = merged.select(row)
        assert (again.plans, again.frames, again.decoder_inputs.keys()) == (
            output.plans,
            output.frames,
            output.decoder_inputs.keys(),
        )
        for name, part in output.decoder_inputs.items():
            assert torch.equal(again.decoder_inputs[name].link.embeddings, part.link.embeddings)
            assert torch.equal(again.decoder_inputs[name].link.parent, part.link.parent)
            assert again.decoder_inputs[name].prompts == part.prompts
        assert torch.equal(again.dense, output.dense)
    assert merge(outputs[:1]) is outputs[0]


def test_a_bad_row_fails_alone(trunk, decoder, jobs, caplog):
    bad = job(5, limited("pose", classes=["dragon"]))
    broken = TrunkJob(np.zeros((0, 0, 3), np.uint8), jobs[0].requests, 6)
    first, refused, crashed, last = trunk.outputs([jobs[0], bad, broken, jobs[1]])
    assert isinstance(refused, UserError) and "dragon" in str(refused)
    assert isinstance(crashed, Exception) and not isinstance(crashed, UserError)
    same(
        decoder.answers([DecoderJob(first, jobs[0].requests)])[0],
        decoder.answers([DecoderJob(trunk.outputs([jobs[0]])[0], jobs[0].requests)])[0],
    )
    torn = dataclasses.replace(last, dense=last.dense[:, :1])
    good, failed = decoder.answers([DecoderJob(first, jobs[0].requests), DecoderJob(torn, jobs[0].requests)])
    assert isinstance(failed, Exception) and len(good) == 2
    assert caplog.text.count("a request failed in the model") == 2


def chat_job(text="what is it ?", **fields):
    request = make_request("chat", text=text, **fields)
    return TrunkJob(None, (dataclasses.replace(request, score_threshold=0.0, max_per_phrase=3),), 6)


def outcome(output):
    """Text, route and tokens of a job's answer, or the reason of its error."""
    if isinstance(output, Exception):
        return output.reason
    (plan,) = output.plans[0]
    return plan.text, plan.route, plan.tokens


def test_a_conversation_that_the_model_refuses_fails_alone(trunk, monkeypatch):
    good = chat_job(history=[("hello", "hi")])
    turns = Turns("Q: ", "A: ", "\nQ: ", "\n")  # of an LLM without a system turn
    monkeypatch.setattr(trunk.stage.tokenizer, "turns", turns)
    jobs = [good, chat_job(system="be brief"), good, chat_job(history=[("red circle " * 2000, "hi")])]
    outputs = [outcome(output) for output in trunk.outputs(jobs)]
    assert (outputs[1], outputs[3]) == ("no_system_turn", "context_too_long")
    assert outputs[0] == outputs[2] == outcome(trunk.outputs([good])[0])


def test_conversations_with_several_images_share_a_pass_with_others(trunk, model_folder):
    pictures = [np.random.default_rng(n).integers(0, 256, (48, 64, 3), dtype=np.uint8) for n in range(3)]
    chat = chat_job(history=[("hello", "hi")], image_turns=[1])
    jobs = [dataclasses.replace(chat, image=shown) for shown in ([*pictures[:2]], [*pictures[1:]])]
    jobs.insert(1, dataclasses.replace(chat_job(), image=pictures[2]))
    engine = Engine.load(model_folder)
    for job, output in zip(jobs, pickle.loads(pickle.dumps(trunk.outputs(jobs))), strict=True):
        ((answer,),) = engine.run([job.image], [job.requests], max_new_tokens=job.max_new_tokens)
        assert outcome(output) == (answer.text, answer.route, answer.tokens)


def test_a_seed_gives_the_same_answer_whatever_the_batch(trunk):
    def drawn(seed):
        return chat_job(sampling=Sampling(temperature=1.0, seed=seed))

    alone = [outcome(trunk.outputs([drawn(seed)])[0]) for seed in range(4)]
    greedy = chat_job(history=[("hello", "hi")])
    together = trunk.outputs([greedy, drawn(2), drawn(0), drawn(2), greedy, drawn(1), drawn(3)])
    got = [outcome(output) for output in together]
    assert [got[n] for n in (2, 5, 1, 6)] == alone and got[1] == got[3]
    assert len({str(answer) for answer in alone}) > 1 and outcome(trunk.outputs([greedy])[0]) == got[0] == got[4]


def test_each_request_keeps_its_own_limits(trunk, decoder):
    loose, strict = limited("detect", classes=["a"], limit=4), limited("detect", 0.999, classes=["a"], limit=4)
    one = limited("detect", classes=["a"], limit=1)
    asked = job(6, loose, strict, one)
    many, none, single = decoder.answers([DecoderJob(trunk.outputs([asked])[0], asked.requests)])[0]
    assert (len(many.predictions[0]), len(none.predictions[0]), len(single.predictions[0])) == (4, 0, 1)


def test_text_answers_and_info(trunk, jobs):
    async def both():
        with pytest.raises(UserError, match="dragon"):
            await trunk.link(job(5, limited("pose", classes=["dragon"])))
        return await trunk.link(jobs[3]), await trunk.info()

    reply, info = asyncio.run(both())
    (answer,) = reply.answers
    assert not reply.decoders and reply.output is None and answer.task == "vqa" and answer.text is not None
    assert info["preset"] == "nano" and info["skeletons"] == {"figure": ["head", "left hand"]}


def test_a_chat_names_the_decoders_that_it_has_links_for(trunk, decoder, monkeypatch):
    """In one pass of the trunk, whatever the LLM decides."""
    passes, links = [], trunk.stage.links
    monkeypatch.setattr(trunk.stage, "links", lambda *args, **more: passes.append(1) or links(*args, **more))
    monkeypatch.setattr(trunk, "_store", kept)
    asked = job(1, limited("chat", text="find the red circle"))

    def link(token):
        with monkeypatch.context() as patch:
            force_answers(patch, trunk.stage.loop, [token] * 6)
            return asyncio.run(trunk.link(asked))

    said = link(trunk.stage.tokenizer.encode("red")[0])
    assert (said.decoders, said.output) == ((), None) and said.answers[0].text == "red red red red red red"
    routed = link(trunk.stage.tokenizer.ids["[DET]"])
    assert routed.decoders == ("lumen",) and routed.answers == (None,) and len(passes) == 2
    ((answer,),) = decoder.answers([DecoderJob(routed.output, asked.requests)])
    assert answer.route == "[DET]" and len(answer.predictions) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_short_answer_and_boxes_do_not_wait_for_a_long_answer(model_folder, monkeypatch, dtype):
    trunk = TrunkReplica(str(model_folder), "cpu", {}, partial(load_trunk, dtype=dtype))
    forced = [trunk.stage.tokenizer.encode("red")[0]] * 400
    force_answers(monkeypatch, trunk.stage.loop, forced)
    order = []

    async def ask(name, asked):
        await trunk.output(asked)
        order.append(name)

    async def all_of_them():
        long = asyncio.create_task(ask("long", job(1, limited("caption"), max_new_tokens=400)))
        while not trunk.stage.loop._active:  # until it is being written
            await asyncio.sleep(0.001)
        short = ask("short", job(2, limited("caption"), max_new_tokens=3))
        boxes = ask("boxes", job(3, limited("detect", classes=["red circle"])))
        await asyncio.gather(long, short, boxes)

    asyncio.run(all_of_them())
    assert sorted(order[:2]) == ["boxes", "short"] and order[2] == "long"


def test_what_waits_for_the_model_is_one_batch_of_its_kind(trunk):
    """Twelve jobs come while the model is busy."""
    sizes = []
    outputs = trunk.outputs

    async def busy():
        with trunk.stage.loop.turn():
            kinds = [limited("detect", classes=["red circle"]), limited("caption")]
            tasks = [asyncio.create_task(trunk.output(job(n, kinds[n % 2]))) for n in range(12)]
            await asyncio.sleep(0.05)
        return await asyncio.gather(*tasks)

    def counted(jobs):
        sizes.append(len(jobs))
        return outputs(jobs)

    trunk.batches._run = counted
    trunk.reconfigure(batching(max_batch_size=5))
    try:
        found = asyncio.run(busy())
    finally:
        trunk.batches._run = outputs
    assert sorted(sizes) == [1, 1, 5, 5] and len(found) == 12


@pytest.mark.parametrize(("task", "expected"), [("detect", [1, 5]), ("caption", [1, 1, 1, 1, 1, 1])])
def test_what_comes_during_a_pass_is_one_batch(trunk, task, expected):
    """Batches were taken while a pass did not use the model for a moment, and then waited for it. Those of text are
    taken all the same, since answers are written together."""
    sizes, free = [], threading.Event()
    outputs = trunk.outputs
    request = limited(task, **({"classes": ["red circle"]} if task == "detect" else {}))

    def slow(jobs):
        sizes.append(len(jobs))
        assert free.wait(20)
        return outputs(jobs)

    async def all_of_them():
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(trunk.output(job(number, request))))
            while len(sizes) + len(trunk.batches._waiting) <= number:
                await asyncio.sleep(0.001)
            while expected[-1] == 1 and len(sizes) <= number or not sizes:
                await asyncio.sleep(0.001)
        free.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 20)

    trunk.batches._run = slow
    try:
        found = asyncio.run(all_of_them())
    finally:
        trunk.batches._run = outputs
    assert sizes == expected and len(found) == 6


def batches_of(collector, items):
    """The batches in which a collector runs items that come while its model is busy with another."""
    sizes, free, began = [], threading.Event(), threading.Event()

    def run(batch):
        sizes.append(batch)
        began.set()
        free.wait(20)
        return batch

    collector._run = run

    async def all_of_them():
        first = asyncio.create_task(collector.submit(items[0]))
        await asyncio.to_thread(began.wait, 20)
        others = [asyncio.create_task(collector.submit(item)) for item in items[1:]]
        await asyncio.sleep(0.02)
        free.set()
        return await asyncio.wait_for(asyncio.gather(first, *others), 20)

    assert asyncio.run(all_of_them()) == items
    return sizes


def test_the_tokens_of_a_batch_are_bounded():
    collector = Collector(list, lambda item: 0, lambda item: item)
    collector.configure(batching(max_batch_size=4, max_batch_tokens=10))
    assert batches_of(collector, [1, 30, 6, 7, 2, 1, 1, 1, 1]) == [[1], [30], [6, 2, 1, 1], [7, 1, 1]]


def test_the_decoder_takes_everything_that_waits(decoder, trunk, jobs):
    """With `serve.batch` a batch was closed while the decoder was busy."""
    output, asked = trunk.outputs([jobs[0]])[0], jobs[0].requests
    answers = decoder.answers
    sizes = []

    def counted(batch):
        sizes.append(len(batch))
        with decoder.model.turn():
            began.set()
            assert free.wait(20)
        return answers(batch)

    async def seven():
        tasks = [asyncio.create_task(decoder.decode(output, asked))]
        await asyncio.to_thread(began.wait, 20)
        tasks += [asyncio.create_task(decoder.decode(output, asked)) for _ in range(6)]
        while len(decoder.batches._waiting) < 6:
            await asyncio.sleep(0.001)
        free.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)

    began, free = threading.Event(), threading.Event()
    decoder.reconfigure(batching())
    decoder.batches._run = counted
    try:
        found = asyncio.run(seven())
    finally:
        decoder.batches._run = answers
    assert len(found) == 7 and sizes == [1, 6]


def test_owners_whose_items_wait_are_served_in_turn():
    collector = Collector(list, lambda item: 0, owner=lambda item: item[0])
    collector.configure(batching(max_batch_size=3))
    waiting = ["a0", "a1", "a2", "a3", "b0", "a4", "b1", "c0"]
    assert batches_of(collector, ["x", *waiting]) == [["x"], ["a0", "b0", "c0"], ["a1", "b1", "a2"], ["a3", "a4"]]


def asked_beside(expensive, cheap, is_waiting, target, name, is_expensive):
    """Makes an expensive call and, from its first pass on, a cheap one beside it; returns the passes of the expensive
    one before the cheap answer, and all. A pass is a call of `target.name`, and the expensive one's end once somebody
    `is_waiting` for the model, or the cheap answer is there."""
    began, answered, passes = threading.Event(), threading.Event(), []
    compute = getattr(target, name)

    def counted(*args):
        if is_expensive(*args):
            passes.append(1)
            began.set()
            wait_for(lambda: answered.is_set() or is_waiting())
        return compute(*args)

    async def both():
        long = asyncio.create_task(expensive())
        assert await asyncio.to_thread(began.wait, 20)
        await cheap()
        before = len(passes)
        answered.set()
        await long
        return before, len(passes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, counted)
        return asyncio.run(both())


def test_a_cheap_request_waits_for_one_pass_of_an_expensive_one_at_a_time(trunk):
    """Once for each time that it comes to the model: to be taken, to encode its image, to make its links."""
    names = [f"object {n}" for n in range(1000)]
    before, passes = asked_beside(
        lambda: trunk.output(job(1, limited("detect", classes=names))),
        lambda: trunk.output(job(2, limited("detect", classes=["gadget"]))),
        lambda: trunk.stage.loop._arriving,
        trunk.stage.word_links,
        "_compute",
        lambda branches, *_: len(branches) > 1,
    )
    assert before <= 3 and passes == 8


def test_a_decoder_gives_way_between_its_passes(trunk, decoder, monkeypatch):
    many, one = (limited("detect", classes=names) for names in ([f"thing {n}" for n in range(12)], ["gadget"]))
    output, small = trunk.outputs([job(1, many), job(2, one)])
    monkeypatch.setattr("lumen_ray.inference.decoder_stage.MAX_DECODER_CELLS", 1)
    decoder.reconfigure(batching())
    before, passes = asked_beside(
        lambda: decoder.decode(output, (many,)),
        lambda: decoder.decode(small, (one,)),
        lambda: decoder.model._share._line,
        decoder.stage.decoder,
        "predict",
        lambda _raw, _frames, prompts, _settings: prompts[0].phrase != "gadget",
    )
    assert before <= 4 and passes == 12  # a busy machine lets one or two more go first


def test_batches_that_leave_the_model_do_not_keep_others_from_it():
    """However many: a decoder's pictures, each in passes of its own, and then a detection."""
    is_over, pictures, begun = threading.Event(), 40, []

    def run(items):
        if items[0] < pictures:
            begun.append(items[0])
            assert is_over.wait(60)
        return items

    collector = Collector(run, lambda item: item, workers=MANY, leaves=lambda item: item < pictures)

    async def all_of_them():
        running = [asyncio.create_task(collector.submit(n)) for n in range(pictures)]
        try:
            await asyncio.to_thread(wait_for, lambda: len(begun) == pictures)
            assert await asyncio.wait_for(collector.submit(pictures), 20) == pictures
        finally:
            is_over.set()
            assert await asyncio.gather(*running) == list(range(pictures))

    asyncio.run(all_of_them())


def test_no_item_is_left_behind_by_those_of_other_keys():
    model = threading.Lock()
    collector = Collector(list, lambda item: item % 7, turn=lambda: model, workers=8)
    collector.configure(batching(max_batch_size=3))

    async def rounds():
        for _ in range(200):
            found = await asyncio.wait_for(asyncio.gather(*(collector.submit(n) for n in range(12))), 20)
            assert found == list(range(12))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        asyncio.run(rounds())
    finally:
        sys.setswitchinterval(switch)


def test_an_error_reaches_every_item_that_waits():
    def broken():
        raise RuntimeError("no model")

    collector = Collector(list, lambda item: 0, turn=broken)

    async def both():
        return await asyncio.wait_for(asyncio.gather(collector.submit(1), collector.submit(2)), 20)

    assert [str(error) for error in asyncio.run(both())] == ["no model", "no model"]


def test_a_stuck_model_is_not_ready_and_then_replaced(trunk, decoder):
    """Event loops answer all the time: only the thread of the model is busy."""

    async def state(replica):
        ready = await replica.ping()
        try:
            await replica.check_health()
        except RuntimeError as error:
            return ready, str(error)
        return ready, None

    def states(busy, replica):
        """At once, then after the one and after the other limit of a pass."""
        found = []
        with busy():
            for not_ready_after_s, replace_after_s in ((60, 60), (0.01, 60), (0.01, 0.02)):
                time.sleep(0.03)
                limits = {"not_ready_after_s": not_ready_after_s, "replace_after_s": replace_after_s}
                replica.reconfigure(batching(**limits))
                found.append(asyncio.run(state(replica)))
        return [*found, asyncio.run(state(replica))]

    for busy, replica in ((trunk.stage.loop.turn, trunk), (decoder.model.turn, decoder)):
        ready, slow, (last, error), after = states(busy, replica)
        assert ready == (True, None) and slow == (False, None) and after == (True, None)
        assert last is False and "in one pass for 0 s" in error
        replica.reconfigure(batching())


def test_the_clock_runs_while_the_decoder_does(decoder, trunk, jobs, monkeypatch):
    busy, group = [], decoder._answer_group
    monkeypatch.setattr(decoder, "_answer_group", lambda jobs: busy.append(decoder.model.busy_s()) or group(jobs))
    decoder.answers([DecoderJob(trunk.outputs([jobs[0]])[0], jobs[0].requests)])
    assert busy[0] > 0 and decoder.model.busy_s() == 0


def test_a_job_that_is_cancelled_while_it_waits_is_dropped(trunk):
    async def cancelled():
        with trunk.stage.loop.turn():
            gone = asyncio.create_task(trunk.output(job(1, limited("caption"))))
            kept = asyncio.create_task(trunk.output(job(2, limited("caption"))))
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.sleep(0.01)
        await kept
        return gone.cancelled()

    assert asyncio.run(cancelled())


def given_up(replica_work, until):
    """Cancels a call once `until` is true."""

    async def cancelled():
        call = asyncio.create_task(replica_work)
        while not until():
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait([call])
        return call.cancelled()

    assert asyncio.run(cancelled())


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_text_that_nobody_waits_for_is_given_up(trunk, monkeypatch):
    loop = trunk.stage.loop
    force_answers(monkeypatch, loop, [trunk.stage.tokenizer.encode("red")[0]] * 1000)
    written, step = [], loop._next_tokens
    monkeypatch.setattr(loop, "_next_tokens", lambda: written.append(1) or step())
    given_up(trunk.output(job(1, limited("caption"), max_new_tokens=1000)), lambda: len(written) > 3)
    wait_for(lambda: not loop._active)
    assert len(written) < 900 and loop.bytes_held == 0


def test_passes_end_between_chunks_when_nobody_waits(trunk, monkeypatch):
    """300 names are three passes of the LLM; whoever asked leaves during the first."""
    passes, compute, go_on = [], trunk.stage.word_links._compute, threading.Event()

    def slow(*args):
        passes.append(1)
        assert go_on.wait(20)
        return compute(*args)

    monkeypatch.setattr(trunk.stage.word_links, "_compute", slow)
    names = [f"thing {n}" for n in range(300)]
    given_up(trunk.output(job(1, limited("detect", classes=names))), lambda: passes)
    go_on.set()
    wait_for(lambda: not trunk.stage.loop._busy)
    assert len(passes) == 1
    # the others of a batch are still answered
    (output,) = trunk.outputs([job(1, limited("detect", classes=names[:2]))])
    assert list(output.decoder_inputs) == ["lumen"]


def test_a_batch_goes_on_while_one_of_its_callers_waits():
    began, go_on, seen = threading.Event(), threading.Event(), []

    def run(items):
        if items != [0]:
            began.set()
            assert go_on.wait(20)
            seen.append(cancellation.current()())
        return items

    collector = Collector(run, lambda item: 0)
    collector.configure(batching(batch_wait_timeout_s=0.05))

    async def ask(leaving):
        began.clear()
        go_on.clear()
        calls = [asyncio.create_task(collector.submit(n)) for n in (1, 2)]
        await asyncio.to_thread(began.wait, 20)
        for call in calls[:leaving]:
            call.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        return [outcome.__class__ for outcome in await asyncio.gather(*calls, return_exceptions=True)]

    assert asyncio.run(ask(1)) == [asyncio.CancelledError, int]
    assert asyncio.run(ask(2)) == [asyncio.CancelledError] * 2
    wait_for(lambda: len(seen) == 2)
    assert seen == [True, False]


def test_the_trunk_sends_a_task_to_the_decoder_that_was_chosen(tmp_path):
    model = str(tiny_folder(tmp_path, grounding_dino=EXPERTS["grounding_dino"]))
    asked = job(1, limited("detect", classes=["red circle"]))
    for serving, name in (({}, "lumen"), ({"detect": "grounding_dino"}, "grounding_dino")):
        trunk = TrunkReplica(model, "cpu", serving)
        (output,) = trunk.outputs([asked])
        assert list(output.decoder_inputs) == [name] and asyncio.run(trunk.info())["decoders"]["detect"] == name


def test_replicas_answer_in_the_dtype_that_is_set(model_folder):
    trunk = TrunkReplica(str(model_folder), "cpu", {}, partial(load_trunk, dtype="bfloat16"))
    decoder = DecoderReplica(str(model_folder), "lumen", "cpu", partial(load_decoder, dtype="bfloat16"))
    assert trunk.stage.dtype == decoder.stage.dtype == "bfloat16"


def test_map_grouped_keeps_order_and_groups():
    seen = []

    def tenfold(items):
        seen.append(items)
        return [10 * item for item in items]

    assert map_grouped([3, 2, 5, 4], lambda item: item % 2, tenfold) == [30, 20, 50, 40]
    assert seen == [[3, 5], [2, 4]]


def test_the_cost_of_requests_is_a_bound_of_their_tokens(trunk):
    """Every byte of a text is a token at most, whatever the language."""
    words = ["red circle", "größter Kreis", "红色圆圈", "🙂🙂", "qxzvk"]
    encode = trunk.stage.tokenizer.encode
    assert all(len(encode(word)) <= len(word.encode()) + 1 for word in words)
    detect = limited("detect", classes=words)
    assert cost_of([detect], 48) == sum(len(word.encode()) for word in words)
    assert cost_of([detect, limited("caption"), limited("vqa", text="what ?")], 48) == cost_of([detect], 0) + 96 + 6
    pose = limited("pose", classes=["figure", "man"], keypoints=["head", "hand"])
    assert cost_of([pose], 48) == (6 + 3) * 3 + 2 * (4 + 4)
    assert [cost_of([limited("detect", classes=["x" * n])], 48) for n in (256, 257, 2000)] == [256, 514, 16_000]
    assert cost_of([limited("vqa", text="x" * 2000)], 48) == 2048
    assert cost_of([limited("ground", text="a [red circle] by a [square]")], 48) == len("red circle" + "square")
