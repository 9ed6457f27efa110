"""Who gets a model next: counted in turns, on a clock of the test's."""

from __future__ import annotations

import threading

import pytest

from lumen_ray.cancellation import Cancelled, between_passes, wanted_while
from lumen_ray.inference.fair_share import FairShare, SharedModel, acting_for


class Line:
    """A `FairShare` whose turns take the seconds that its user says."""

    def __init__(self):
        self.now = 0.0
        self.share = FairShare(lambda: self.now)
        self.tickets = []

    def come(self, name, owner=None):
        with acting_for([name if owner is None else owner]):
            self.tickets.append((name, self.share.draw()))

    def serve(self, seconds, goes_on=False):
        """Serves the next one; returns its name."""
        ((name, ticket),) = [one for one in self.tickets if self.share.is_next(one[1])]
        self.share.begin(ticket)
        self.now += seconds
        self.share.end(goes_on)
        if not goes_on:
            self.tickets.remove((name, ticket))
        return name


def test_newcomers_go_before_the_next_pass_of_an_expensive_request():
    line = Line()
    line.come("expensive")
    assert line.serve(1, goes_on=True) == "expensive"
    line.come("first")
    assert line.serve(1, goes_on=True) == "expensive"  # alone until now, it has had no more than its share
    line.come("second")
    assert [line.serve(0.1) for _ in range(2)] == ["first", "second"]
    assert line.serve(1, goes_on=True) == "expensive"


def test_an_expensive_request_is_not_put_off_for_ever_by_newcomers():
    """Of an endless stream of them one waits at any time."""
    line, served = Line(), []
    line.come("expensive")
    for number in range(100):
        line.come(f"cheap {number}")
        name = line.serve(1.0 if line.share.is_next(line.tickets[0][1]) else 0.1, goes_on=not number)
        served.append(name)
        if number and name == "expensive":
            line.come("expensive")
            line.tickets.insert(0, line.tickets.pop())
    assert served.count("expensive") > 3


def test_keys_have_equal_time_however_much_one_asks():
    line = Line()
    for number in range(30):
        line.come(f"a{number}", "a")
    for number in range(3):
        line.come(f"b{number}", "b")
    served = [line.serve(1.0) for _ in range(10)]
    assert [name[0] for name in served[:6]] == ["a", "b"] * 3 and served[0] == "a0"
    assert [name[0] for name in served[6:]] == ["a"] * 4


def test_a_key_that_was_alone_owes_nothing():
    line = Line()
    for number in range(10):
        line.come(f"a{number}", "a")
        line.serve(1.0)
    for number in range(4):
        line.come(f"a{number}", "a")
        line.come(f"b{number}", "b")
    assert [line.serve(1.0)[0] for _ in range(4)] == ["a", "b", "a", "b"]
    assert line.share._used.keys() <= {"a", "b"}


def test_a_shared_pass_counts_in_parts():
    line = Line()
    with acting_for(["a", "b"]):
        line.tickets.append(("both", line.share.draw()))
    line.come("c")
    assert line.serve(2.0, goes_on=True) == "both"
    assert line.share._used == {"a": 1.0, "b": 1.0}


def test_others_have_the_model_between_passes_only():
    model, seen, inside = SharedModel(), [], threading.Event()

    def other():
        with model.turn():
            seen.append("other")

    thread = threading.Thread(target=other)
    with model.turn():
        thread.start()
        while not model._share._line:
            inside.wait(0.001)
        seen.append("first")
        between_passes()
        seen.append("second")
        assert model.busy_s() > 0
    thread.join(20)
    assert seen == ["first", "other", "second"] and model.busy_s() == 0


def test_work_that_nobody_wants_ends_at_the_next_pass_and_leaves_the_model():
    model = SharedModel()
    with pytest.raises(Cancelled), model.turn(), wanted_while(lambda: False):
        between_passes()
    with model.turn():
        pass
