"""Rounds in which the failed images of a job are asked again, each once.

``ledger/retry.json`` holds the number of the round that is going on. A fragment that is published in it carries the
number in its entry (`ledger.py`); what is left are the fragments with errors of earlier rounds, whichever process dies.
"""

from __future__ import annotations

import json

from lumen_ray.data import files, urls
from lumen_ray.label.ledger import Ledger

_FILE = "retry.json"


def open_round(ledger: Ledger, is_wanted: bool = False) -> int:
    """The round that is going on. If none is and one `is_wanted`, one is begun; 0 for none, or without any errors."""
    number = current_round(ledger.folder)
    if not number and is_wanted:
        entries = [(len(entry["errors"]), entry.get("round", 0)) for _, entry in ledger.entries()]
        if not any(errors for errors, _ in entries):
            return 0
        number = 1 + max(before for _, before in entries)
        files.write_bytes(urls.join(ledger.folder, _FILE), json.dumps({"round": number}).encode())
    if number:
        files.remove(urls.join(ledger.output, "summary.json"))  # the job is not finished until a new one is written
    return number


def current_round(ledger: urls.Location) -> int:
    """The round that is going on in a ledger folder, 0 if none is."""
    path = urls.join(ledger, _FILE)
    return int(json.loads(files.read_text(path))["round"]) if files.is_file(path) else 0


def end_round(ledger: Ledger) -> None:
    """Marks that nothing is left to be asked again."""
    files.remove(urls.join(ledger.folder, _FILE))
