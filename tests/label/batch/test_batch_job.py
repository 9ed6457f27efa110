"""Batch files in this process: what is answered, what is refused, and runs after a kill."""

import base64
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.chat_fakes import ChatEngine, answers, errors, line, read_lines
from support.label_fakes import encode, picture

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.label.batch import lines as batch_lines
from lumen_ray.label.batch.job import answer_batch, answered_line
from lumen_ray.label.batch.output import write_outputs
from lumen_ray.label.batch.requests import ANSWER_SCHEMA
from lumen_ray.label.ledger import Ledger
from lumen_ray.label.status import label_status, status_lines

TESTS = Path(__file__).resolve().parents[2]
OPTIONS = {"num_actors": 0, "fragment_size": 4, "batch_size": 3}
PNG = encode(picture(0))
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def write(folder, *texts):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "requests.jsonl"
    path.write_text("\n".join(texts))
    return path


def run(tmp_path, *texts, engine=None, **options):
    engine = engine or ChatEngine()
    return answer_batch(lambda: engine, write(tmp_path, *texts), tmp_path / "out", **{**OPTIONS, **options})


def test_requests_are_answered_in_their_order_and_together(tmp_path):
    engine = ChatEngine()
    summary = run(tmp_path, *(line(f"id {n}", f"question {n}") for n in range(10)), engine=engine)
    assert (summary["requests"], summary["answered"], summary["errors"]) == (10, 10, 0)
    assert answers(tmp_path / "out") == {f"id {n}": f"question {n} |  | 0" for n in range(10)}
    assert list(answers(tmp_path / "out")) == [f"id {n}" for n in range(10)]
    assert engine.calls == [3, 1, 3, 1, 2] and errors(tmp_path / "out") == []
    assert summary["usage"] == {"prompt_tokens": 60, "completion_tokens": 60, "total_tokens": 120}


def test_a_response_is_that_of_a_server(tmp_path):
    run(tmp_path, line("a", "what is it ?", DATA_URL, max_tokens=2, model="fake@v0"))
    (row,) = read_lines(tmp_path / "out" / "output.jsonl")
    assert set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None
    assert row["id"].startswith("batch_req_") and row["response"]["request_id"].startswith("req_")
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "fake@v0")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "what is"}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}


def test_bodies_and_errors_validate_as_types_of_the_openai_library(tmp_path):
    openai = pytest.importorskip("openai")
    run(tmp_path, line("a", "what ?", DATA_URL, DATA_URL), line("b", "x", tools=[1]), "no json")
    (row,) = read_lines(tmp_path / "out" / "output.jsonl")
    completion = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"], strict=True)
    assert completion.choices[0].message.content and completion.usage.total_tokens > 0
    refused, broken = read_lines(tmp_path / "out" / "errors.jsonl")
    openai.types.shared.ErrorObject.model_validate(refused["response"]["body"]["error"])
    openai.types.BatchError.model_validate(broken["error"], strict=True)


def test_images_come_from_the_request_from_beside_the_file_and_from_stores(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(PNG)
    (tmp_path / "none.png").write_bytes(b"no image")
    run(
        tmp_path,
        line("url", "x", DATA_URL),
        line("base64", "x", DATA_URL.partition(",")[2]),
        line("relative", "x", "photos/a.png"),
        line("absolute", "x", str(tmp_path / "photos" / "a.png")),
        line("file", "x", f"file://{tmp_path}/photos/a.png"),
        line("two", "x", DATA_URL, "photos/a.png"),
        line("web", "x", "https://example.org/a.png"),
        line("missing", "x", "photos/b.png"),
        line("other", "x", "none.png"),
        line("text", "x", "data:text/plain;base64,aGVsbG8="),
    )
    one = "x | 64x48:250 | 0"
    same = dict.fromkeys(("url", "base64", "relative", "absolute", "file"), one)
    assert answers(tmp_path / "out") == {**same, "two": "x | 64x48:250 64x48:250 | 0"}
    assert errors(tmp_path / "out") == [
        ("web", "remote_image_refused"),
        ("missing", "missing_file"),
        ("other", "broken_image"),
        ("text", "invalid_base64"),
    ]


def test_a_conversation_is_read_as_by_a_server(tmp_path):
    messages = [{"role": role, "content": f"{role} text"} for role in ("system", "user", "assistant", "user")]
    run(tmp_path, line("a", messages=messages))
    assert answers(tmp_path / "out") == {"a": "user text |  | 1"}


def test_several_answers_and_results_of_tools_are_as_by_a_server(tmp_path):
    tools = [{"type": "function", "function": {"name": name}} for name in ("detect", "generate")]
    call = {"id": "c", "type": "function", "function": {"name": "detect", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "one found"},
    ]
    run(
        tmp_path, line("drawn", "what ?", n=2, temperature=1), line("result", messages=messages, tools=tools[:1]),
        line("no decoder", "draw it", tools=tools),
    )  # fmt: skip
    assert answers(tmp_path / "out") == {"drawn": "what ? |  | 0", "result": "one found"}
    assert errors(tmp_path / "out") == [("no decoder", "no_decoder")]
    drawn, _ = read_lines(tmp_path / "out" / "output.jsonl")
    assert [choice["index"] for choice in drawn["response"]["body"]["choices"]] == [0, 1]
    assert drawn["response"]["body"]["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}


BAD = {
    "invalid_json": ("{", None),
    "missing_custom_id": (json.dumps({"method": "POST", "body": {}}), None),
    "unknown_method": (line("bad", method="GET"), "bad"),
    "unknown_url": (line("bad", url="/v1/embeddings"), "bad"),
    "duplicate_custom_id": (line("first"), "first"),
    "invalid_request": (json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions"}), "bad"),
}


@pytest.mark.parametrize("code", BAD)
def test_a_line_that_is_no_request_is_an_error_line(tmp_path, code):
    text, custom_id = BAD[code]
    summary = run(tmp_path, line("first"), text, "", line("last"))
    assert (summary["requests"], summary["answered"], summary["reasons"]) == (3, 2, {code: 1})
    assert list(answers(tmp_path / "out")) == ["first", "last"]
    (row,) = read_lines(tmp_path / "out" / "errors.jsonl")
    assert row["custom_id"] == custom_id and row["response"] is None and row["error"]["code"] == code
    assert "line 2" in row["error"]["message"]


@pytest.mark.parametrize("custom_id", ["", 7, None, "\ud800"])
def test_an_id_is_a_text(tmp_path, custom_id):
    run(tmp_path, line(custom_id), line("b"))
    assert errors(tmp_path / "out") == [(None, "missing_custom_id")] and list(answers(tmp_path / "out")) == ["b"]


def test_ids_that_look_like_numbered_ones_are_their_own(tmp_path):
    run(tmp_path, line("a"), line("a"), line("a#2"), line("line 2"), "{")
    assert list(answers(tmp_path / "out")) == ["a", "a#2", "line 2"]
    assert errors(tmp_path / "out") == [("a", "duplicate_custom_id"), (None, "invalid_json")]


REFUSED = {
    "unknown_model": (404, line("a", model="gpt-4o")),
    "unsupported_parameter": (400, line("a", functions=[{"name": "f"}])),
    "streaming_unsupported": (400, line("a", stream=True)),
    "empty_text": (400, line("a", " ")),
    "context_too_long": (400, line("a", "refuse")),
    "internal_error": (500, line("a", "crash")),
}


@pytest.mark.parametrize("code", REFUSED)
def test_a_request_that_a_server_would_refuse_gets_its_response(tmp_path, code):
    status, text = REFUSED[code]
    run(tmp_path, line("b"), text, line("c"))
    (row,) = read_lines(tmp_path / "out" / "errors.jsonl")
    assert row["error"] is None and row["response"]["status_code"] == status
    found = row["response"]["body"]["error"]
    assert found["code"] == code and found["request_id"] == row["response"]["request_id"]
    assert list(answers(tmp_path / "out")) == ["b", "c"]


def test_a_file_of_bad_lines_alone_is_answered_with_errors(tmp_path):
    summary = run(tmp_path, "{", "[]")
    assert (summary["requests"], summary["answered"]) == (2, 0)
    assert answers(tmp_path / "out") == {} and len(errors(tmp_path / "out")) == 2
    assert label_status(tmp_path / "out")["state"] == "finished"


def test_a_model_that_always_fails_stops_the_job(tmp_path):
    with pytest.raises(UserError, match=r"failed on each of \d+ requests; .* mend the model or the requests and run"):
        run(tmp_path, *(line(f"{n}", "crash") for n in range(12)))


def test_a_line_may_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_lines, "LONGEST_LINE", 300)
    run(tmp_path, line("a"), line("b", "x" * 1000), line("c"))
    assert list(answers(tmp_path / "out")) == ["a", "c"] and errors(tmp_path / "out") == [(None, "line_too_long")]


def test_windows_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line('a')}\r\n\r\n{line('ü')}\r\n".encode())
    answer_batch(ChatEngine, path, tmp_path / "out", **OPTIONS)
    assert list(answers(tmp_path / "out")) == ["a", "ü"]


def test_a_killed_job_goes_on_with_every_line_once(tmp_path):
    texts = [line(f"id {n}", "kill" if n == 9 else "slow" if n == 2 else "hello") for n in range(14)]
    path = write(tmp_path, *texts, "{", line("id 3"))
    code = (
        "from support.chat_fakes import killed_engine\n"
        "from lumen_ray.label.batch.job import answer_batch\n"
        f"answer_batch(killed_engine, {str(path)!r}, {str(tmp_path / 'out')!r}, **{OPTIONS!r})\n"
    )
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "KILL_MARKER": str(tmp_path / "killed")}
    first = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    assert not (tmp_path / "out" / "output.jsonl").exists()
    before = Ledger(tmp_path / "out", ANSWER_SCHEMA)
    kept = [row for table in before.tables() for row in table.to_pylist()]
    assert [row["custom_id"] for row in kept] == [f"id {n}" for n in range(8)]
    second = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert list(answers(tmp_path / "out")) == [f"id {n}" for n in range(14)]
    assert errors(tmp_path / "out") == [(None, "invalid_json"), ("id 3", "duplicate_custom_id")]
    rows = read_lines(tmp_path / "out" / "output.jsonl")
    assert [row["id"] for row in rows[:8]] == [row["id"] for row in kept]  # not answered again


def test_progress_and_errors_count_requests(tmp_path):
    texts, seen, states = [line(f"{n}") for n in range(6)] + ["{"] * 3, [], []

    def look(status):
        seen.append(status.facts())
        states.append(label_status(tmp_path / "out"))

    with pytest.raises(UserError, match="stopped after 8 requests with 2 errors"):
        run(tmp_path, *texts, max_errors=1, progress=look)
    assert seen[0]["requests_per_second"] > 0 and "images_per_second" not in seen[0]
    running = {**states[0], "requests_per_second": 2.0}
    assert any(text.endswith(", 2.0 requests/s") for text in status_lines(tmp_path / "out", running))


def test_a_batch_costs_what_its_time_costs(tmp_path):
    summary = run(tmp_path, line("a"), "{", usd_per_hour=3600.0)
    assert summary["usd"] == pytest.approx(summary["spent_seconds"], abs=0.1) and summary["usd"] > 0
    assert "$0." in answered_line(summary, "out") and label_status(tmp_path / "out")["usd_per_hour"] == 3600.0
    again = run(tmp_path, line("a"), "{", usd_per_hour=7200.0)
    assert again["usd"] == pytest.approx(2 * summary["spent_seconds"])


@pytest.mark.parametrize(("option", "value"), [("usd_per_hour", -1.0), ("gpus_per_actor", 0.0)])
def test_a_price_and_a_share_are_checked(tmp_path, option, value):
    with pytest.raises(UserError, match=f"{option} is {value}"):
        run(tmp_path, line("a"), **{option: value})


def test_a_finished_job_is_not_done_again(tmp_path):
    first = run(tmp_path, line("a"), "{")
    again = run(tmp_path, line("a"), "{", engine="is not loaded")
    assert again["requests"] == again["finished_before"] == first["requests"] == 2


@pytest.mark.parametrize("change", ["file", "threshold", "labels"])
def test_a_folder_of_another_job_is_refused(tmp_path, change):
    run(tmp_path, line("a"))
    if change == "labels":
        settings = json.loads((tmp_path / "out" / "job.json").read_text())
        del settings["batch"]
        (tmp_path / "out" / "job.json").write_text(json.dumps(settings))
    texts = [line("a"), line("b")] if change == "file" else [line("a")]
    with pytest.raises(UserError, match="made with other settings") as raised:
        run(tmp_path, *texts, score_threshold=0.5 if change == "threshold" else 0.3)
    assert raised.value.reason == "other_settings"


@pytest.mark.parametrize(("name", "reason"), [("none.jsonl", "missing_input"), ("a.txt", "invalid_input")])
def test_a_file_that_is_no_batch_is_refused(tmp_path, name, reason):
    (tmp_path / "a.txt").write_text(line("a"))
    with pytest.raises(UserError) as raised:
        answer_batch(ChatEngine, tmp_path / name, tmp_path / "out", **OPTIONS)
    assert raised.value.reason == reason


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no request"):
        run(tmp_path, "", "  ")


def test_too_many_errors_stop_the_job(tmp_path):
    with pytest.raises(UserError, match="more than the limit of 1"):
        run(tmp_path, *["{"] * 5, line("a"), max_errors=1)


def test_parts_are_parquet(tmp_path):
    run(tmp_path, line("a", max_tokens=1))
    (part,) = (tmp_path / "out" / "labels").glob("*.parquet")
    (row,) = pq.read_table(part, schema=ANSWER_SCHEMA).to_pylist()
    assert (row["custom_id"], row["status_code"], row["completion_tokens"]) == ("a", 200, 1)
    assert json.loads(row["body"])["choices"][0]["message"]["content"] == "hello"


def test_a_store_takes_the_output(tmp_path):
    path = write(tmp_path, line("a"), "{")
    answer_batch(ChatEngine, path, f"memory://batch-{os.getpid()}/out", **OPTIONS)
    from lumen_ray.data import files

    rows = files.read_text(f"memory://batch-{os.getpid()}/out/output.jsonl").splitlines()
    assert [json.loads(row)["custom_id"] for row in rows] == ["a"]


def test_memory_of_the_output_does_not_grow_with_the_job(tmp_path):
    body = json.dumps({"text": "x" * 10_000})
    ledger = Ledger(tmp_path, ANSWER_SCHEMA)
    row = {"id": "i", "status_code": 200, "request_id": "r", "body": body, "prompt_tokens": 1, "completion_tokens": 2}

    def peak(fragments):
        for number in range(fragments):
            ledger.publish(number, 8, [{**row, "custom_id": f"{number}/{n}"} for n in range(8)], [])
        tracemalloc.start()
        write_outputs(ledger)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # imports
    assert peak(60) < 1.5 * peak(6) + 100_000 and (tmp_path / "output.jsonl").stat().st_size > 60 * 8 * 10_000


def test_the_status_counts_requests_and_exports_refuse(tmp_path, capsys):
    run(tmp_path, line("a"), "{")
    status = label_status(tmp_path / "out")
    assert "2 of 2 requests (100%), 1 errors" in status_lines(tmp_path / "out", status)[0]
    assert cli.main(["label", "export", str(tmp_path / "out"), "--format", "csv"]) == cli.EXIT_USER_ERROR
    assert "holds the answers to a batch file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["photos"], "an input of images"),
        (["--tasks", "detect"], "--tasks"),
        (["--classes", "a"], "--classes"),
        (["--text", "vqa=what ?"], "--text"),
        (["--exemplars", "a.yaml"], "--exemplars"),
        (["--tile", "512"], "--tile"),
        (["--overlap", "0.2"], "--overlap"),
        (["--image-column", "a"], "--image-column"),
        (["--refresh"], "--refresh"),
        (["--export", "coco"], "--export"),
    ],
)
def test_options_about_images_do_not_go_with_a_batch_file(tmp_path, capsys, extra, named):
    path = write(tmp_path, line("a"))
    code = cli.main(["label", *extra[:1], "--input-jsonl", str(path), "--output", str(tmp_path / "out"), *extra[1:]]
                    if extra[0] == "photos" else
                    ["label", "--input-jsonl", str(path), "--output", str(tmp_path / "out"), *extra])  # fmt: skip
    assert code == cli.EXIT_USER_ERROR and not (tmp_path / "out").exists()
    assert f"{named} does not go with --input-jsonl" in capsys.readouterr().err


def test_an_input_is_needed(tmp_path, capsys):
    assert cli.main(["label", "--output", str(tmp_path)]) == cli.EXIT_USER_ERROR
    assert "--input-jsonl" in capsys.readouterr().err


def test_the_command_answers_with_the_bundled_weights(tmp_path, capsys):
    path = write(tmp_path, line("a", "hello ?", max_tokens=4), line("b", "how many ?", DATA_URL), "{")
    command = ["label", "--input-jsonl", str(path), "--output", str(tmp_path / "out"), "--actors", "0"]
    assert cli.main([*command, "--usd-per-hour", "36", "--gpus-per-actor", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "3 requests: 2 answered, 1 errors" in shown and " req/s" in shown and "$0." in shown.rsplit("; ")[-1]
    assert list(answers(tmp_path / "out")) == ["a", "b"]
    assert cli.main([*command, "--strict"]) == 3
