"""A preset small enough to train in a test, as a file, since benches name their preset."""

from pathlib import Path

import yaml

from support.tiny_models import tiny_settings


def tiny_preset(folder: Path) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(vocab_size=330).model_dump(mode="json")))
    return str(path)
