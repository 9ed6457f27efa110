"""The job server of a Ray head, whose errors are sentences."""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lumen_ray.errors import UserError, unknown
from lumen_ray.ray_env import prepare_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_S = 10.0
#: connections that are lost while logs are followed, in a row, before it is given up
LOST_CONNECTIONS = 5


@dataclass(frozen=True)
class JobState:
    """A job. `status`: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; `started` and `ended`: seconds since 1970;
    `exit_code`: of its command, None while it runs and where it was stopped or never began."""

    job_id: str
    status: str
    command: str
    message: str = ""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Head:
    """The head of a cluster by the address of its dashboard, such as ``http://HEAD:8265``.

    Raises `UserError` if no head answers there, for a wrong token, and if the cluster's Ray or Python is of another
    minor version than this one's: what is tested is one version of Ray at a time.
    """

    def __init__(self, address: str):
        self.address = url_of(address)
        prepare_environment()
        _check_answers(self.address)
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):  # they log uploads and connections, at a level that they set
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        with self._asked():
            self.client: JobSubmissionClient = JobSubmissionClient(self.address)
            self._check_versions()

    def submit(self, command: str, working_dir: str | None, env: dict[str, str], job_id: str | None) -> str:
        """Starts a job; returns its id. working_dir: a zip file to unpack where the command runs."""
        runtime_env: dict[str, Any] = {"env_vars": env} if env else {}
        if working_dir is not None:
            runtime_env["working_dir"] = working_dir
        if job_id is not None and any(job.job_id == job_id for job in self.jobs()):
            raise UserError(f"the cluster already has a job '{job_id}'; choose another --job-id", "job_exists")
        with self._asked():
            return self.client.submit_job(entrypoint=command, runtime_env=runtime_env, submission_id=job_id)

    def jobs(self) -> list[JobState]:
        """The submitted jobs, oldest first."""
        with self._asked():
            found = [_state(job) for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.started or 0)

    def job(self, job_id: str) -> JobState:
        """Raises `UserError` if there is no such job."""
        jobs = {job.job_id: job for job in self.jobs()}
        if job_id not in jobs:
            if not jobs:
                raise UserError(f"the cluster has no job '{job_id}', and no others", "unknown_job")
            raise unknown("job", job_id, jobs)
        return jobs[job_id]

    def logs(self, job_id: str) -> str:
        """What the job has written so far."""
        with self._asked():
            return str(self.client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job has written and writes, until it ends. A connection that is lost is made again."""
        sent = lost = 0
        while True:
            seen = 0
            with asyncio.Runner() as runner:
                pieces = self.client.tail_job_logs(job_id)
                while (piece := runner.run(_next(pieces))) is not None:
                    seen += len(piece)
                    if seen > sent:  # a new connection begins with all that was written
                        yield piece[max(0, len(piece) - (seen - sent)) :]
                        sent, lost = seen, 0
            if self.job(job_id).has_ended:
                return
            lost += 1
            if lost > LOST_CONNECTIONS:
                raise UserError(
                    f"the logs of '{job_id}' stop, while it goes on; follow them with lumen-ray jobs logs {job_id} "
                    f"--follow --address {self.address}",
                    "no_logs",
                )

    def stop(self, job_id: str) -> None:
        """Sends the job's command SIGTERM, and three seconds later SIGKILL. Returns before it has ended."""
        with self._asked():
            self.client.stop_job(job_id)

    def _check_versions(self) -> None:
        import ray

        answer = self.client._do_request("GET", "/api/v0/cluster_metadata")  # no public call has Python's version
        found = answer.json().get("data", {}) if answer.status_code == 200 else {}
        pairs = (
            ("Ray", str(found.get("rayVersion", ray.__version__)), ray.__version__),
            ("Python", str(found.get("pythonVersion", platform.python_version())), platform.python_version()),
        )
        for name, there, here in pairs:
            if there.split(".")[:2] != here.split(".")[:2]:
                raise UserError(
                    f"the cluster at {self.address} has {name} {there} and this environment {here}; use the same minor "
                    "version on both",
                    "other_version",
                )

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Turns the errors of Ray's client into sentences."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"the cluster at {self.address} refuses the token of this shell; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN to the cluster's token",
                "wrong_token",
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise _no_head(self.address, type(error).__name__) from None
        except RuntimeError as error:  # Ray's client has no other class for what the server answers
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the cluster at {self.address} refuses this: {reason}", "refused") from None


def url_of(address: str) -> str:
    """``HEAD:8265 -> http://HEAD:8265``. Raises `UserError` for other schemes."""
    scheme, separator, rest = address.rpartition("://")
    if not separator:
        scheme = "http"
    if scheme not in ("http", "https") or not rest:
        raise UserError(
            f"--address '{address}' must be that of the cluster's dashboard, such as http://HEAD:8265", "usage"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def _check_answers(address: str) -> None:
    """Asks once with a limit of time, which Ray's client does not have. Any HTTP status will do: the client says what
    is wrong."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S) as response:
            json.load(response)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise UserError(f"{address} is not the dashboard of a Ray cluster (HTTP 404)", "no_head") from None
    except (OSError, TimeoutError, ValueError) as error:
        raise _no_head(address, str(getattr(error, "reason", error))) from None
    except (KeyError, TypeError):
        raise UserError(f"{address} is not the dashboard of a Ray cluster", "no_head") from None


def _no_head(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray head answers at {address} ({reason}); give the address of its dashboard with --address, and forward "
        "its port if it is inside a private network",
        "no_head",
    )


async def _next(pieces: Any) -> str | None:
    """The next piece; None at the end, also of the connection."""
    import aiohttp

    try:
        return str(await anext(pieces))
    except (StopAsyncIteration, RuntimeError, aiohttp.ClientError):
        return None


def _state(job: Any) -> JobState:
    return JobState(
        job_id=job.submission_id,
        status=str(job.status.value),
        command=job.entrypoint,
        message=(job.message or "").strip(),
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
    )
