"""`--address` of the verbs, and the verb `jobs`."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from lumen_ray.console import console, say, seconds
from lumen_ray.errors import UserError
from lumen_ray.remote.paths import SHARED, SHARED_VARIABLE

#: verbs that can be jobs
SUBMITTED = ("prepare", "train", "evaluate", "label", "serve")
#: the address that Ray's own `ray job` reads
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def add_submit_args(parser: argparse.ArgumentParser) -> None:
    """Adds `--address` and what belongs to it."""
    group = parser.add_argument_group("as a job of a Ray cluster")
    group.add_argument("--address", metavar="URL", help="dashboard of the cluster, e.g. http://HEAD:8265")
    group.add_argument(
        "--working-dir",
        metavar="DIR",
        default=".",
        help="folder that the job takes along, less what its .gitignore and .rayignore name, or none (default: .)",
    )
    group.add_argument(
        "--env",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="environment variable of the job, with the value given or that of this shell; may be repeated. The "
        "dashboard shows values: give secrets to the cluster's nodes instead",
    )
    group.add_argument(
        "--shared",
        metavar="DIR",
        action="append",
        default=[],
        help=f"folder that all nodes see, may be repeated (default: ${SHARED_VARIABLE}, else {', '.join(SHARED)})",
    )
    group.add_argument("--job-id", metavar="ID", help="name of the job (default: made by Ray)")
    group.add_argument("--no-wait", action="store_true", help="return once the job is submitted")


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `add_submit_args` in a command line, and what is left of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_submit_args(parser)
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error), "usage") from None


def check_local(options: argparse.Namespace, arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options of a job without `--address`, which a verb run here would ignore."""
    unset = vars(split([])[0])
    for name, default in unset.items():
        option = f"--{name.replace('_', '-')}"
        if getattr(arguments, name, default) != default:  # the verb's own parser takes abbreviations
            raise UserError(f"write {option} in full", "usage")
        if getattr(options, name) != default:
            raise UserError(f"{option} is for jobs on a cluster; give --address URL with it", "usage")


def submit(options: argparse.Namespace, argv: Sequence[str], arguments: argparse.Namespace) -> int:
    """Runs `lumen-ray ARGV` on the cluster of `options`; returns its exit status."""
    from lumen_ray.remote.submit import Submission

    submission = Submission(
        options.address,
        options.working_dir,
        tuple(options.env),
        tuple(options.shared),
        options.job_id,
        options.no_wait,
    )
    not_paths = {"verb", "kind", "run", *vars(options)}
    return submission.run(argv, {name: value for name, value in vars(arguments).items() if name not in not_paths})


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `jobs list`, `jobs status`, `jobs logs` and `jobs stop`; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("jobs", help="list, follow and stop the jobs of a Ray cluster")
    actions = p.add_subparsers(dest="action", metavar="ACTION", parser_class=parser_class, required=True)
    for name, (run, help_text) in _ACTIONS.items():
        q = actions.add_parser(name, help=help_text)
        if name != "list":
            q.add_argument("job", metavar="ID", help="job to act on")
        q.add_argument(
            "--address",
            metavar="URL",
            help=f"dashboard of the cluster, e.g. http://HEAD:8265 (default: ${ADDRESS_VARIABLE})",
        )
        if name in ("list", "status"):
            q.add_argument("--json", action="store_true", help="print JSON")
        if name == "logs":
            q.add_argument("--follow", action="store_true", help="print until the job ends, and exit with its status")
        q.set_defaults(run=run)


def _head(args: argparse.Namespace) -> Any:
    from lumen_ray.remote.head import Head

    address = args.address or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise UserError(f"give the cluster's dashboard with --address, or set {ADDRESS_VARIABLE}", "usage")
    return Head(address)


def _list(args: argparse.Namespace) -> None:
    jobs = _head(args).jobs()
    if args.json:
        print(json.dumps([asdict(job) for job in jobs]))
        return
    from rich.table import Table

    table = Table("job", "status", "took", "command", box=None)
    for job in jobs:
        table.add_row(escape(job.job_id), job.status, _took(job), escape(job.command))
    console.print(table if jobs else "no jobs")


def _status(args: argparse.Namespace) -> None:
    job = _head(args).job(args.job)
    if args.json:
        print(json.dumps(asdict(job)))
        return
    code = "" if job.exit_code is None else f", exit status {job.exit_code}"
    say(f"{escape(job.job_id)}: {job.status}{code}, {_took(job)}: {escape(job.command)}")
    if job.status == "FAILED" and job.message:
        print(job.message)


def _logs(args: argparse.Namespace) -> int:
    head = _head(args)
    head.job(args.job)
    if args.follow:
        from lumen_ray.remote.submit import follow

        return follow(head, args.job)
    print(head.logs(args.job), end="")
    return 0


def _stop(args: argparse.Namespace) -> None:
    head = _head(args)
    job = head.job(args.job)
    if job.has_ended:
        say(f"{escape(job.job_id)} had ended: {job.status}")
        return
    head.stop(job.job_id)
    say(f"stopping {escape(job.job_id)}")


def _took(job: Any) -> str:
    return "" if job.started is None else seconds((job.ended or time.time()) - job.started)


_ACTIONS = {
    "list": (_list, "jobs of the cluster, oldest first"),
    "status": (_status, "state of a job"),
    "logs": (_logs, "what a job has written"),
    "stop": (_stop, "stop a job"),
}
