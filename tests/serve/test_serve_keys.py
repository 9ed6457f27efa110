"""API keys: making one, the file that holds their hashes, and the rate that a key may have."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from lumen_ray.errors import UserError
from lumen_ray.serve import keys
from lumen_ray.serve.keys import Keyring, new_key, read_keys
from lumen_ray.serve.quota import Quota, duration


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch):
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)


def test_a_key_is_found_by_its_line(tmp_path):
    path = tmp_path / "keys.yaml"
    made = {name: new_key(name) for name in ("alice", "bob@example.org")}
    path.write_text("\n".join(line for _, line in made.values()))
    ring = Keyring(path)
    for name, (key, line) in made.items():
        found = ring.find(key)
        assert found is not None and found[0] == name
        assert key not in line and hashlib.sha256(key.encode()).hexdigest() in line
    assert ring.find(made["alice"][0][:-1] + "-") is None and ring.find("") is None


def test_a_password_is_no_key_even_where_the_file_has_its_hash(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f'alice: {{sha256: "{hashlib.sha256(b"secret").hexdigest()}"}}')
    assert Keyring(path).find("secret") is None


def test_all_hashes_are_compared_in_constant_time(tmp_path, monkeypatch):
    path = tmp_path / "keys.yaml"
    made = [new_key(f"k{n}") for n in range(3)]
    path.write_text("\n".join(line for _, line in made))
    ring, compared = Keyring(path), []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(b) or a == b)
    assert ring.find(made[0][0])[0] == "k0" and len(compared) == 3


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(keys.logger, "warning", lambda text, *values: told.append(text % values))
    path = tmp_path / "keys.yaml"
    (alice, line), (bob, other) = new_key("alice"), new_key("bob")
    path.write_text(line)
    ring = Keyring(path)
    path.write_text(f"{line}\n{other}")
    assert ring.find(bob)[0] == "bob"
    path.write_text("alice: {sha256: short}")
    assert ring.find(alice)[0] == "alice" and "stay as they were" in told[-1]
    path.unlink()
    assert ring.find(bob)[0] == "bob"
    path.write_text("")  # revokes all
    assert ring.find(alice) is None and "read 0 API keys" in told[-1] and alice not in "".join(told)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alice: {sha256: abc}", "'sha256' is invalid"),
        (f"a: {{sha256: '{64 * '0'}', request_per_minute: 1}}", "did you mean 'requests_per_minute'"),
        ("- alice", "mapping"),
        ("'a b': {sha256: abc}", "letters, digits"),
        (f"a: {{sha256: '{64 * '0'}', requests_per_minute: 0}}", "requests_per_minute"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, says):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_keys(path)
    with pytest.raises(UserError, match="keys file '.*' does not exist"):
        read_keys(tmp_path / "none.yaml")


def test_the_command_prints_the_line_and_shows_the_key(tmp_path):
    path = tmp_path / "keys.yaml"
    command = [sys.executable, "-m", "lumen_ray.cli", "serve", "--new-key", "alice"]
    with path.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, env=os.environ, check=True)
    key = done.stderr.split()[-1]
    assert Keyring(path).find(key)[0] == "alice"
    with pytest.raises(UserError, match="1 to 64 letters"):
        new_key("a: b")


def test_a_bucket_refills_at_its_rate():
    now = [0.0]
    quota = Quota(60, None, lambda: now[0])
    assert [quota.take() for _ in range(61)] == [True] * 60 + [False]
    assert quota.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    assert quota.retry_after_s == 1
    now[0] = 0.9
    assert not quota.take()
    now[0] = 2.0
    assert [quota.take() for _ in range(3)] == [True, True, False]
    now[0] = 1000.0
    assert quota.headers()["x-ratelimit-remaining-requests"] == "60"


def test_a_slow_rate_says_how_long_to_wait():
    now = [0.0]
    quota = Quota(2, None, lambda: now[0])
    assert quota.take() and quota.take() and not quota.take()
    assert quota.retry_after_s == 30
    now[0] = 10.5
    assert quota.retry_after_s == 20
    quota.configure(2, 1)  # the same rate: no fresh bucket
    assert not quota.take()
    quota.configure(3, 1)
    assert quota.take()


def test_durations_are_written_as_openai_does():
    assert [duration(s) for s in (0, 0.12, 1, 1.5, 60, 360.25)] == ["0ms", "120ms", "1s", "1.5s", "1m0s", "6m0.25s"]
