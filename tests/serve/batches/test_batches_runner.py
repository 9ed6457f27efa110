"""Batches in this process: what becomes of each line, of a batch that is stopped, and of one that was killed."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import threading

import pytest
from support.batch_fakes import BatchServer, line
from support.serve_fakes import png

from lumen_ray.data.claim import Claim
from lumen_ray.errors import UserError
from lumen_ray.serve.batches import work
from lumen_ray.serve.http import Unavailable

URL = "data:image/png;base64," + base64.b64encode(png()).decode()


def texts(rows):
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}


def codes(rows):
    return {r["custom_id"]: (r["error"] or r["response"]["body"]["error"])["code"] for r in rows}


def test_every_line_is_answered_or_an_error(batch_server):
    batch_id = batch_server.create(
        line("a", "one"), "", line("b", "two", URL), line("c", "x", model="gpt-4o"), line("d", "x", logit_bias={"1": 2})
    )
    assert batch_server.shown(batch_id)["status"] == "validating"
    (batch,) = batch_server.finish(batch_id)
    assert batch["status"] == "completed" and batch["errors"] is None and batch["model"] == "nano@abc123"
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    rows = batch_server.rows(batch["output_file_id"])
    assert texts(rows) == {"a": "chat says one", "b": "chat says two"}
    assert set(rows[0]) == {"id", "custom_id", "response", "error"} and rows[0]["error"] is None
    failed = batch_server.rows(batch["error_file_id"])
    assert codes(failed) == {"c": "unknown_model", "d": "unsupported_parameter"}
    assert [row["response"]["status_code"] for row in failed] == [404, 400]
    assert batch_server.files.get(batch["output_file_id"], None).filename == f"{batch_id}_output.jsonl"
    assert not batch_server.batches.work(batch_id).exists()


def test_a_batch_without_errors_has_no_file_of_them(batch_server):
    good, bad = batch_server.finish(
        batch_server.create(line("a")), batch_server.create(line("a", "refuse"), line("b", "crash"))
    )
    assert good["output_file_id"] and good["error_file_id"] is None
    assert bad["output_file_id"] is None and bad["status"] == "completed"
    assert codes(batch_server.rows(bad["error_file_id"])) == {"a": "context_too_long", "b": "internal_error"}


def test_what_passes_by_itself_is_waited_for(batch_server):
    """A full queue and a replica that dies once cost no line its answer; one that always fails is given up."""
    kinds = ("busy x", "lost x", "dies x", "late x", "good x")
    (batch,) = batch_server.finish(batch_server.create(*(line(kind, kind) for kind in kinds)))
    assert texts(batch_server.rows(batch["output_file_id"])).keys() == {"busy x", "lost x", "good x"}
    failed = batch_server.rows(batch["error_file_id"])
    assert codes(failed) == {"dies x": "unavailable", "late x": "timeout"}
    assert [row["response"]["status_code"] for row in failed] == [503, 504]
    assert batch_server.backend.asked == {"busy x": 2, "lost x": 2, "dies x": 3, "late x": 3, "good x": 1}


def test_a_bounded_number_of_requests_is_in_flight(tmp_path):
    """On behalf of one sender, so that all batches together wait for their turn as one user does."""
    server = BatchServer(tmp_path, in_flight=3, at_once=2)
    ids = [server.create(*(line(f"{n}", f"{b} {n}") for n in range(50))) for b in range(3)]
    assert [batch["request_counts"]["completed"] for batch in server.finish(*ids)] == [50] * 3
    assert server.backend.most == 3 and server.backend.senders == {"batches"}


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("{", "invalid_json"),
        (json.dumps({"method": "POST"}), "missing_custom_id"),
        (line("b", method="GET"), "unknown_method"),
        (line("b", url="/v1/embeddings"), "unknown_url"),
        (line("a"), "duplicate_custom_id"),
        (line("b", "x" * 300_000), "line_too_long"),
    ],
)
def test_a_file_with_a_line_that_is_no_request_fails(tmp_path, bad, code):
    server = BatchServer(tmp_path)
    limits = server.settings.limits.model_copy(update={"max_body_bytes": 200_000})
    server.settings = server.settings.model_copy(update={"limits": limits})
    (batch,) = server.finish(server.create(line("a"), "", bad, line("c")))
    assert batch["status"] == "failed" and batch["failed_at"] and batch["output_file_id"] is None
    ((problem),) = batch["errors"]["data"]
    assert (problem["code"], problem["line"]) == (code, 3) and "line 3" in problem["message"]
    assert not server.backend.asked


def test_files_without_requests_with_too_many_and_that_are_gone_fail(tmp_path):
    server = BatchServer(tmp_path, max_lines=2)
    empty, long, gone = server.create("", " "), server.create(*map(line, "abc")), server.create(line("a"))
    server.files.delete(server.shown(gone)["input_file_id"])
    found = [batch["errors"]["data"][0] for batch in server.finish(empty, long, gone)]
    assert [problem["code"] for problem in found] == ["empty_file", "too_many_lines", "unknown_file"]
    assert all(problem["line"] is None for problem in found)


def test_a_batch_shows_the_first_of_many_problems(batch_server):
    (batch,) = batch_server.finish(batch_server.create(*["{"] * 300))
    assert [problem["line"] for problem in batch["errors"]["data"]] == list(range(1, 101))


def test_a_client_cannot_read_the_servers_files(batch_server, tmp_path):
    (tmp_path / "photo.png").write_bytes(png())
    places = [str(tmp_path / "photo.png"), f"file://{tmp_path}/photo.png", "../photo.png", "s3://bucket/photo.png"]
    (batch,) = batch_server.finish(batch_server.create(*(line(place, "x", place) for place in places)))
    assert set(codes(batch_server.rows(batch["error_file_id"])).values()) <= {"invalid_base64", "remote_image_refused"}
    assert batch["request_counts"] == {"total": 4, "completed": 0, "failed": 4}


def cancelled(server, batch_id, after):
    """The batch, cancelled while its questions behind the first `after` are with the model."""

    async def run():
        def step(_):
            if server.batches.state(batch_id).status == "in_progress" and len(server.backend.asked) >= after:
                server.batches.cancel(batch_id)
            return server.batches.state(batch_id).has_ended

        await server.run(step)

    asyncio.run(run())
    return server.shown(batch_id)


def test_a_cancelled_batch_keeps_its_answers_and_names_the_others(batch_server, monkeypatch):
    monkeypatch.setattr(work, "FRAGMENT_LINES", 4)
    batch_id = batch_server.create(*(line(f"{n}", f"question {n}") for n in range(200)))
    batch = cancelled(batch_server, batch_id, after=20)
    assert batch["status"] == "cancelled" and batch["cancelling_at"] and batch["cancelled_at"]
    answered = texts(batch_server.rows(batch["output_file_id"]))
    left = codes(batch_server.rows(batch["error_file_id"]))
    assert set(left.values()) == {"batch_cancelled"} and 0 < len(answered) < 200
    assert answered.keys() | left.keys() == {f"{n}" for n in range(200)} and not answered.keys() & left.keys()
    assert batch["request_counts"] == {"total": 200, "completed": len(answered), "failed": len(left)}
    batch_server.batches.cancel(batch_id)  # once more changes nothing
    assert batch_server.shown(batch_id) == batch


def test_a_batch_is_cancelled_before_it_begins(batch_server):
    batch_id = batch_server.create(line("a"))
    batch_server.batches.cancel(batch_id)
    assert batch_server.shown(batch_id)["status"] == "cancelling"
    (batch,) = batch_server.finish(batch_id)
    assert (batch["status"], batch["output_file_id"], batch["error_file_id"]) == ("cancelled", None, None)


def test_one_that_has_ended_cannot_be_cancelled(batch_server):
    batch_id = batch_server.create(line("a"))
    batch_server.finish(batch_id)
    with pytest.raises(UserError, match="is completed") as raised:
        batch_server.batches.cancel(batch_id)
    assert raised.value.reason == "batch_ended"


def test_a_batch_expires_with_what_it_has(batch_server):
    batch_id = batch_server.create(*(line(f"{n}", f"question {n}") for n in range(100)), window_s=10)

    def step(_):
        if len(batch_server.backend.asked) >= 5:
            batch_server.now += 11
        return batch_server.batches.state(batch_id).has_ended

    asyncio.run(batch_server.run(step))
    batch = batch_server.shown(batch_id)
    assert batch["status"] == "expired" and batch["expired_at"] >= batch["expires_at"]
    left = codes(batch_server.rows(batch["error_file_id"]))
    assert set(left.values()) == {"batch_expired"}
    assert len(left) + len(batch_server.rows(batch["output_file_id"])) == 100


def test_a_batch_whose_model_never_comes_expires(batch_server, monkeypatch):
    batch_id = batch_server.create(line("a"), window_s=10)

    async def info():
        batch_server.now += 5
        raise Unavailable("a deployment of the model failed to start")

    monkeypatch.setattr(batch_server.backend, "info", info)
    (batch,) = batch_server.finish(batch_id)
    assert (batch["status"], batch["model"]) == ("expired", None)
    assert codes(batch_server.rows(batch["error_file_id"])) == {"a": "batch_expired"}


def test_a_killed_runner_goes_on_with_every_line_once(batch_server, monkeypatch):
    monkeypatch.setattr(work, "FRAGMENT_LINES", 4)
    batch_id = batch_server.create(*(line(f"{n}", f"question {n}") for n in range(40)))
    asyncio.run(batch_server.run(lambda _: batch_server.batches.state(batch_id).counts.completed >= 8))
    between = batch_server.shown(batch_id)
    assert between["status"] == "in_progress" and 8 <= between["request_counts"]["completed"] < 40
    (batch,) = batch_server.finish(batch_id)
    assert list(texts(batch_server.rows(batch["output_file_id"]))) == [f"{n}" for n in range(40)]
    asked = batch_server.backend.asked
    assert sum(count > 1 for count in asked.values()) <= 8  # of the fragments that were open
    assert batch["usage"]["total_tokens"] == 0 and batch["in_progress_at"] == between["in_progress_at"]


def test_a_runner_killed_while_it_finalizes_writes_the_output_once(batch_server, monkeypatch):
    batch_id, adopt = batch_server.create(line("a"), line("b", "refuse")), batch_server.files.adopt

    def killed(*args):
        adopt(*args)
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(batch_server.files, "adopt", killed)
        batch_server.now += 1
        state = batch_server.batches.state

        async def until_killed():
            await batch_server.run(lambda _: len(batch_server.files.of(None)) == 2)

        asyncio.run(until_killed())
        assert state(batch_id).status == "finalizing"
    (batch,) = batch_server.finish(batch_id)
    assert batch["status"] == "completed" and len(batch_server.files.of(None)) == 3
    assert len(batch_server.rows(batch["output_file_id"])) == len(batch_server.rows(batch["error_file_id"])) == 1


def test_two_processes_do_not_answer_the_same_folder(batch_server):
    batch_id = batch_server.create(line("a"))

    async def both():
        runners = 0

        def third_look(_):
            nonlocal runners
            runners += 1
            return runners > 20

        with Claim(batch_server.settings.batches.folder):  # of another process
            await batch_server.run(third_look)
        assert not batch_server.backend.asked
        await batch_server.run(lambda _: batch_server.batches.state(batch_id).has_ended)

    asyncio.run(both())
    assert batch_server.shown(batch_id)["status"] == "completed"


def test_a_runner_that_lost_its_claim_stops_and_asks_for_it_again(batch_server, monkeypatch):
    monkeypatch.setattr(work, "FRAGMENT_LINES", 4)
    batch_id, lost = batch_server.create(*(line(f"{n}", f"question {n}") for n in range(40))), []

    def step(found):
        if len(batch_server.backend.asked) >= 10 and not lost:
            lost.append(found._claim)
            found._claim.is_lost = True
            found.wake()
        return batch_server.batches.state(batch_id).has_ended and found._claim is not lost[0]

    asyncio.run(batch_server.run(step))
    batch = batch_server.shown(batch_id)
    assert [row["custom_id"] for row in batch_server.rows(batch["output_file_id"])] == [f"{n}" for n in range(40)]


def test_a_bug_fails_the_batch_and_not_the_others(batch_server, monkeypatch):
    bad, good = batch_server.create(line("a")), batch_server.create(line("a"))
    read = work.BatchWork.waiting

    def broken(self):
        if bad in self.ledger.output:
            raise KeyError("a bug")
        return read(self)

    monkeypatch.setattr(work.BatchWork, "waiting", broken)
    failed, done = batch_server.finish(bad, good)
    assert (failed["status"], failed["errors"]["data"][0]["code"]) == ("failed", "internal_error")
    assert done["status"] == "completed"


@pytest.mark.parametrize("text", ["", "{", '{"status": "lost"}'])
def test_a_damaged_state_fails_that_batch_alone(batch_server, text, caplog):
    bad, good = batch_server.create(line("a")), batch_server.create(line("a"))
    (batch_server.batches.folder / bad / "state.json").write_text(text)
    failed, done = batch_server.finish(bad, good)
    assert (failed["status"], failed["errors"]["data"][0]["code"]) == ("failed", "damaged_record")
    assert failed["failed_at"] and done["status"] == "completed"
    assert sum("is damaged" in record.getMessage() for record in caplog.records) == 1


def test_damaged_records_are_swept_and_a_damaged_cancellation_holds(batch_server):
    lost, cancelled = batch_server.create(line("a")), batch_server.create(line("b"))
    folder = batch_server.batches.folder
    (folder / lost / "batch.json").write_text("{")
    (folder / cancelled / "cancel.json").write_text("")
    (batch,) = batch_server.finish(cancelled)
    assert batch["status"] == "cancelled" and [found.id for found in batch_server.batches.newest(None)] == [cancelled]
    batch_server.now += 100_000
    batch_server.batches.sweep()
    assert [path.name for path in folder.iterdir()] == [cancelled]


def test_records_of_a_newer_version_are_read(batch_server):
    batch_id = batch_server.create(line("a"))
    for path in batch_server.batches.folder.parent.rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_newer_version": 1}))
    (batch_server.batches.folder / batch_id / "state.json").write_text('{"counts": {"new": 1}, "new": 1}')
    (batch,) = batch_server.finish(batch_id)
    assert batch["status"] == "completed" and len(batch_server.files.of(None)) == 2


def test_a_bug_in_the_work_on_all_batches_does_not_end_it(batch_server, monkeypatch, caplog):
    batch_id, unfinished, calls = batch_server.create(line("a")), batch_server.batches.unfinished, []

    def broken():
        calls.append(1)
        if len(calls) < 4:
            raise KeyError("a bug")
        return unfinished()

    monkeypatch.setattr(batch_server.batches, "unfinished", broken)
    (batch,) = batch_server.finish(batch_id)
    assert batch["status"] == "completed" and "batches begin again" in caplog.text


def held_lines(server, monkeypatch, failures):
    """A batch whose folder cannot be read so many times while its first line is with the model, which answers once `go`
    is not empty."""
    batch_id = server.create(*(line(f"{n}", f"question {n}") for n in range(12)))
    cancelling_at, infer = server.batches.cancelling_at, server.backend.infer
    looks, failed, go, began = itertools.count(), [], [], threading.Event()

    def unreadable(name):
        if next(looks) not in range(2, 2 + failures):  # the first two: of the batch, and of a line
            return cancelling_at(name)
        assert began.wait(20)
        failed.append(name)
        raise UserError("the disk cannot be read", "unreadable")

    async def held(*args):
        began.set()
        server.backend.inside += 1
        try:
            while not go:
                await asyncio.sleep(0.001)
        finally:
            server.backend.inside -= 1
        return await infer(*args)

    monkeypatch.setattr(server.batches, "cancelling_at", unreadable)
    monkeypatch.setattr(server.backend, "infer", held)
    return batch_id, failed, go, began


async def run_for_at_most_20_s(server, step):
    async with asyncio.timeout(20):
        await server.run(step)


def test_a_folder_that_cannot_be_read_once_costs_no_line_twice(batch_server, monkeypatch):
    batch_id, failed, go, _ = held_lines(batch_server, monkeypatch, failures=1)

    def step(_):
        if failed:
            go.append(1)
        return batch_server.batches.state(batch_id).has_ended

    asyncio.run(run_for_at_most_20_s(batch_server, step))
    assert len(texts(batch_server.rows(batch_server.shown(batch_id)["output_file_id"]))) == 12
    assert len(batch_server.backend.asked) == 12 and set(batch_server.backend.asked.values()) == {1}


def test_no_line_stays_with_the_model_when_its_fragment_is_given_up(batch_server, monkeypatch):
    batch_id, failed, go, began = held_lines(batch_server, monkeypatch, failures=12)

    def step(_):
        if began.is_set() and not batch_server.backend.inside:
            go.append(1)
        return batch_server.batches.state(batch_id).has_ended

    asyncio.run(run_for_at_most_20_s(batch_server, step))
    assert len(failed) == 12 and batch_server.shown(batch_id)["request_counts"]["completed"] == 12


def test_old_files_and_batches_are_removed(tmp_path):
    server = BatchServer(tmp_path, retention_days=1)
    old = server.create(line("a"))
    (batch,) = server.finish(old)
    waiting = server.create(line("a"), window_s=200_000)
    server.now += 100_000
    asyncio.run(server.run(lambda runner: not list(server.batches.newest(None, waiting))))
    assert [found.id for found in server.batches.newest(None)] == [waiting]
    kept = [path.name for path in (tmp_path / "files").iterdir()]
    assert server.shown(waiting)["input_file_id"] in kept and batch["output_file_id"] not in kept
