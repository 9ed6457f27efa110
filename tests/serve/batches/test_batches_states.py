"""Whatever happens to a batch and when, it ends once, and each of its lines is answered or failed once."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batch_fakes import BatchServer, line

from lumen_ray.data import claim
from lumen_ray.serve.batches import runner, work
from lumen_ray.serve.batches.records import ENDED, BatchState

#: what a batch may be shown as after each status, the same one aside
AFTER = {
    "validating": {"in_progress", "cancelling", "cancelled", "failed", "expired", "finalizing"} | ENDED,
    "in_progress": {"finalizing", "cancelling"} | ENDED,
    "finalizing": {"cancelling"} | ENDED,
    "cancelling": {"cancelled", "failed", "completed"},
}
KINDS = ("good", "busy", "lost", "dies", "late", "refuse", "crash")
#: a moment of a batch: so many questions were asked
MOMENT = st.integers(0, 25)
BATCH = st.lists(st.sampled_from(KINDS), min_size=1, max_size=15)


async def live(server, batch_id, kills, cancel_at, expire_at):
    """Runs a batch to its end, with a kill after each of so many further questions; the statuses it was shown as."""
    seen = []

    def look(_):
        asked = sum(server.backend.asked.values())
        if cancel_at is not None and asked >= cancel_at and not server.batches.state(batch_id).has_ended:
            server.batches.cancel(batch_id)
        if expire_at is not None and asked >= expire_at:
            server.now = max(server.now, server.batches.get(batch_id, None).expires_at)
        status = server.shown(batch_id)["status"]
        if not seen or seen[-1] != status:
            seen.append(status)
        return status in ENDED

    for kill in kills:
        until = sum(server.backend.asked.values()) + kill
        await server.run(lambda r, until=until: look(r) or sum(server.backend.asked.values()) >= until)
    await server.run(look)
    return seen


@settings(max_examples=30, deadline=None)
@given(BATCH, st.lists(MOMENT, max_size=3), st.none() | MOMENT, st.none() | MOMENT)
def test_each_line_is_in_the_output_once(kinds, kills, cancel_at, expire_at):
    pauses = patch.object(claim, "SETTLE_S", 0.0), patch.object(runner, "_AGAIN_S", 0.001)
    with tempfile.TemporaryDirectory() as folder, pauses[0], pauses[1], patch.object(work, "FRAGMENT_LINES", 4):
        server = BatchServer(Path(folder), in_flight=2)
        batch_id = server.create(*(line(f"{n}", f"{kind} {n}") for n, kind in enumerate(kinds)))
        seen = asyncio.run(live(server, batch_id, kills, cancel_at, expire_at))
        batch = server.shown(batch_id)
        assert all(later in AFTER[before] for before, later in zip(seen, seen[1:], strict=False)), seen
        assert batch["status"] == seen[-1] in ENDED - {"failed"}
        answered = [row["custom_id"] for row in server.rows(batch["output_file_id"])]
        failed = [row["custom_id"] for row in server.rows(batch["error_file_id"])]
        counts = batch["request_counts"]
        assert (counts["completed"], counts["failed"]) == (len(answered), len(failed))
        if batch["finalizing_at"] is None:  # stopped before it began
            assert batch["status"] in ("cancelled", "expired") and not answered and not failed
            return
        assert sorted(answered + failed) == sorted(f"{n}" for n in range(len(kinds))), (answered, failed)
        assert counts["total"] == len(kinds)
        if batch["status"] == "completed":
            kept = [f"{n}" for n, kind in enumerate(kinds) if kind in ("good", "busy", "lost")]
            assert answered == kept
        times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", batch["status"])]
        assert times == sorted(times)


@given(st.lists(st.sampled_from(["in_progress", "finalizing", "completed", "failed", "expired", "cancelled"])))
def test_states_follow_each_other(statuses):
    """No state is entered twice, and nothing follows the last."""
    state = BatchState()
    for now, status in enumerate(statuses):
        try:
            state = state.enter(status, now)
        except AssertionError:
            continue
        assert state.times[status] == now
    assert set(state.times) <= set(statuses) and len(ENDED & set(state.times)) <= 1
    if state.has_ended:
        with pytest.raises(AssertionError, match="does not follow"):
            state.enter("in_progress", 99)
