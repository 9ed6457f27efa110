"""Rejected records of a `prepare` job: their counts, how messages quote them, and how many of them are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lumen_ray.data.sources.base import Listing, Rejected, Source
from lumen_ray.data.values import number
from lumen_ray.errors import UserError


def describe(record: Rejected) -> str:
    """A rejected record for a message: where it is, why it is rejected and how to mend it."""
    name = record["image_id"]
    where = record["origin"] + (f" ('{name}')" if name and name not in record["origin"] else "")
    return f"{where}: {record['reason']} ({record['mend']})"


def by_rule(rejected: Sequence[Rejected]) -> list[dict[str, Any]]:
    """The rules by which records were rejected, most frequent first: `rule`, `records` (their number), `mend`, and the
    `first` one."""
    first: dict[str, Rejected] = {}
    for record in rejected:
        first.setdefault(record["rule"], record)
    numbers = Counter(record["rule"] for record in rejected)
    return [
        {
            "rule": rule,
            "records": records,
            "mend": first[rule]["mend"],
            "first": {key: first[rule][key] for key in ("kind", "image_id", "origin", "reason")},
        }
        for rule, records in numbers.most_common()
    ]


def count_records(
    inputs: Mapping[str, int], written: Mapping[str, int], rejected: Sequence[Rejected]
) -> dict[str, dict[str, int]]:
    """The counts of the manifest: records `in`, `written` and `rejected`, per kind."""
    lost = Counter(record["kind"] for record in rejected)
    kinds = dict.fromkeys([*inputs, *written, *lost])
    return {k: {"in": inputs.get(k, 0), "written": written.get(k, 0), "rejected": lost[k]} for k in kinds}


def no_row_message(source: Source, counts: dict[str, dict[str, int]], rejected: Sequence[Rejected]) -> str:
    """The message for an input without a usable row."""
    # of an image and its records, the image's reason; of images that lost all their records, a record's
    roots = [r for r in rejected if r["rule"] not in ("image_rejected", "no_items")]
    first = next((r for r in roots if r["kind"] == source.row_kind), next(iter(roots), None))
    why = f"; the first, {describe(first)}" if first else ""
    return f"none of {counts[source.row_kind]['in']} {source.row_kind} can be used{why}"


def check_unknown(counts: Mapping[str, Mapping[str, int]], rejected: Sequence[Rejected]) -> None:
    """Raises `UserError` with the first reason if more than half of a kind of record is of unknown category or image:
    then the list of classes does not belong to the annotations."""
    unknown: dict[str, list[Rejected]] = {}
    for record in rejected:
        if record["rule"] in ("unknown_category", "unknown_image"):
            unknown.setdefault(record["kind"], []).append(record)
    for kind, records in unknown.items():
        if 2 * len(records) > counts[kind]["in"]:
            raise UserError(
                f"{len(records)} of {counts[kind]['in']} {kind} name a class or an image that is not listed; the "
                f"first, {describe(records[0])}; nothing was written",
                "invalid_annotations",
            )


class RejectedLimit:
    """Stops a job of which more than a share of some kind of record is rejected.

    `share`: percent, a number or a text such as "5%"; None: no limit.
    """

    def __init__(self, share: str | float | None):
        percent = number(share.strip().removesuffix("%") if isinstance(share, str) else share)
        if share is not None and (percent is None or not 0 <= percent <= 100):
            raise UserError(
                f"max_rejected must be a share from 0% to 100%, such as 5%; got {share!r}", "invalid_config"
            )
        self.percent = percent

    def check(self, counts: dict[str, dict[str, int]], rejected: Sequence[Rejected]) -> None:
        """Raises `UserError` with the first reasons if the share is exceeded; `counts` as in the manifest."""
        for kind, count in counts.items():
            if self.percent is None or 100 * count["rejected"] <= self.percent * count["in"]:
                continue
            first = [r for r in rejected if r["kind"] == kind]
            reasons = list({r["rule"]: describe(r) for r in reversed(first)}.values())[::-1][:3]
            raise UserError(
                f"{count['rejected']} of {count['in']} {kind} are rejected, more than {self.percent:g}%: "
                f"{'; '.join(reasons)}; nothing was written",
                "too_many_rejected",
            )

    def check_listing(self, listing: Listing) -> None:
        """`check` of what the listing rejects, before anything is written."""
        self.check(count_records(listing.inputs, Counter(), listing.rejected), listing.rejected)

    def watch(self, listing: Listing) -> Callable[[Sequence[dict[str, Any]]], None]:
        """A check of the results so far: stops as soon as the share is exceeded even if all the rest is written.

        Only kinds whose number the listing knows can be judged before the end.
        """
        lost = list(listing.rejected)
        judged = 0

        def check(results: Sequence[dict[str, Any]]) -> None:
            nonlocal judged
            for result in results[judged:]:
                lost.extend(result["rejected"])
            judged = len(results)
            counted = {kind for result in results for kind in result["came_in"]}
            known = {kind: total for kind, total in listing.inputs.items() if kind not in counted and total}
            self.check(count_records(known, Counter(), [r for r in lost if r["kind"] in known]), lost)

        return check
