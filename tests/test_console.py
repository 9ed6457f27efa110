"""The progress lines of a log file."""

import pytest

from lumen_ray import console
from lumen_ray.errors import UserError
from lumen_ray.training_report import training_note


@pytest.fixture
def lines(monkeypatch):
    """A clock that the test sets, and what was said."""
    said, clock = [], [100.0]
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    return clock, said


def test_a_class_file_may_have_comments(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# shapes\nred circle\n\n  # more\nblue square # 2\n")
    assert console.class_names(str(path)) == ["red circle", "blue square # 2"]
    assert console.class_names("and/or,") == ["and/or"] and console.class_names("on/off, b") == ["on/off", "b"]


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("\n \n", "is empty"), ("# a\n", "holds only comments")])
def test_a_class_file_without_a_class(tmp_path, text, words):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"classes.txt' {words}; write one class a line"):
        console.class_names(str(path))


@pytest.mark.parametrize("start", [0, 900])
def test_time_left_counts_from_the_first_step_seen(lines, start):
    clock, said = lines
    bar = console.Bar("train", None)
    clock[0] += 50  # loading is no step
    bar.update(start + 1, start + 100)
    clock[0] += 20
    bar.update(start + 11, start + 100)
    assert said[-1] == f"  train: {start + 11}/{start + 100}, about 2:58 left"  # 89 steps of 2 s


def test_the_first_line_has_no_rate_and_the_last_nothing_left(lines):
    clock, said = lines
    bar = console.Bar("label", None)
    clock[0] += 20
    bar.update(5, 10)
    bar.update(10, 10, "done")
    assert said == ["  label: 5/10", "  label: 10/10  done"]


def test_a_number_without_a_total_is_written_alone(lines):
    clock, said = lines
    bar = console.Bar("label", None)
    clock[0] += 20
    bar.update(5, None)
    assert said == ["  label: 5"]


def test_a_line_that_would_say_the_same_is_left_out(lines):
    _, said = lines
    bar = console.Bar("export", None)
    for _ in range(3):
        bar.update(64, 64, "review")
    bar.update(64, 64, "coco")
    assert said == ["  export: 64/64  review", "  export: 64/64  coco"]


def test_a_slower_stage_is_reported_at_its_own_speed(lines):
    clock, said = lines
    bar = console.Bar("train", None)
    for step in range(100):
        clock[0] += 1
        bar.update(step, 200)
    for step in range(100, 115):
        clock[0] += 10
        bar.update(step, 200)
    assert said[-1] == "  train: 114/200, about 14:20 left"  # 86 steps of 10 s


def test_a_line_between_updates_is_reported_at_once(lines):
    _, said = lines
    console.Bar("train few", None).line("waiting for room")
    assert said == ["  train few: waiting for room"]


def test_the_note_of_a_step_has_the_losses_that_it_trained():
    line = {"stage": "joint", "loss": 3.0, "loss/lm": 2.0, "loss/box": 0.0, "task/lm/vqa": 2.0, "samples_per_s": 8.4}
    note = training_note(line | {"tokens_per_s": 91.2, "memory_gb": 1.25, "data_wait": 0.02})
    assert note == "joint: lm 2.000 box 0.000  8 img/s, 91 tokens/s, 1.2 GB, 2% waiting for data"


def test_a_log_says_at_once_that_something_starts(lines):
    with console.bar("train nano"):
        assert lines[1] == ["train nano: starting"]
