"""lumen-ray: quickstart, prepare, data, train, evaluate, calibrate, label, serve, convert, plan, jobs, cluster, doctor.

Each verb is a function of `lumen_ray.api` behind options, with a progress bar and a line on what was written. Heavy
imports happen inside the functions, so that `--help` and error messages come at once.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from lumen_ray import api, doctor
from lumen_ray.cluster import command as cluster_command
from lumen_ray.console import (
    bar,
    class_names,
    comma_separated,
    console,
    decoders_by_task,
    say,
)
from lumen_ray.data import command as data_command
from lumen_ray.decoders.registry import problems
from lumen_ray.errors import UserError, suggest
from lumen_ray.label import command as label_command
from lumen_ray.model.convert import command as convert
from lumen_ray.options import decoders_arg, device_arg, dtype_arg, exemplars_arg, model_arg, say_bundled
from lumen_ray.plan import command as plan_command
from lumen_ray.ray_env import prepare_environment
from lumen_ray.remote import command as remote_command
from lumen_ray.training_report import TrainingReport
from lumen_ray.version import __version__

EXIT_USER_ERROR = 2
#: verbs that continue where they stopped
RESUMABLE = ("quickstart", "train", "label")
#: of many arguments that are wrong
_MOST_NAMED = 3


class _Parser(argparse.ArgumentParser):
    """Raises `UserError` for a wrong command line, instead of printing the usage and exiting.

    `subcommands`: parsers that take over if their name is the first argument; else it is the first positional one's.
    `advice`: what to do about more positional arguments than it takes, for the message.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subcommands: dict[str, argparse.ArgumentParser] = {}
        self.advice = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] in self.subcommands:
            return self.subcommands[args[0]].parse_known_args(args[1:], namespace)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest)
        return found, rest

    def _refuse(self, rest: list[str]) -> NoReturn:
        """Raises `UserError` for arguments that are left: the parser of a verb sees its own, and names its own help."""
        if options := [name.partition("=")[0] for name in rest if name.startswith("-")]:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option '{options[0]}';{suggest(options[0], known)}".rstrip(";"))
        shown = ", ".join(f"'{name}'" for name in rest[:_MOST_NAMED])
        more = f" and {len(rest) - _MOST_NAMED} more" if len(rest) > _MOST_NAMED else ""
        self.error(f"unexpected {shown}{more}" + (self.advice and f"; {self.advice}"))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace(chr(10), ' ')} (see '{self.prog} --help')", "usage")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `lumen-ray VERB ...`; each verb sets `run`, the function that carries it out."""
    return _parser_and_verbs()[0]


def _parser_and_verbs() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = _Parser(prog="lumen-ray", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lumen-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    _quickstart_args(verbs)
    data_command.add_args(verbs, _Parser)
    _train_args(verbs)
    _evaluate_args(verbs)
    _calibrate_args(verbs)
    label_command.add_args(verbs, _Parser)
    _serve_args(verbs)
    convert.add_args(verbs, _Parser)
    plan_command.add_args(verbs)
    remote_command.add_args(verbs, _Parser)
    cluster_command.add_args(verbs, _Parser)
    doctor.add_args(verbs)
    return parser, list(verbs.choices)


def _quickstart_args(verbs: Any) -> None:
    p = verbs.add_parser("quickstart", help="run the whole pipeline on synthetic scenes, in minutes on a CPU")
    p.add_argument("--output", default="quickstart", help="folder for everything that is written (default: quickstart)")
    p.add_argument("--recipe", default="quickstart", help="recipe name or YAML (default: quickstart)")
    p.add_argument("--scenes", type=int, default=4096, help="training scenes to render (default: 4096)")
    p.add_argument("--held-out", type=int, default=192, help="held-out scenes to evaluate on (default: 192)")
    p.add_argument("--port", type=int, default=8000, help="port of the server (default: 8000)")
    p.add_argument("--keep-serving", action="store_true", help="keep the server running at the end")
    p.set_defaults(run=_quickstart)


def _train_args(verbs: Any) -> None:
    p = verbs.add_parser("train", help="train a recipe over shards; run it again to resume")
    p.add_argument("--recipe", required=True, help="name in configs/recipes, or a YAML file")
    p.add_argument("--shards", required=True, help="shard folder")
    p.add_argument("--output", required=True, help="run folder or its URL; the trained model is in its 'model' folder")
    p.add_argument(
        "--init-from",
        help="model folder (or bundled weights) to start from, instead of the recipe's; decoders that it lacks start "
        "from fresh weights",
    )
    p.add_argument("--workers", type=int, help="Ray Train workers, instead of the recipe's")
    p.add_argument(
        "--validate",
        metavar="SHARDS",
        help="held-out shard folder to score during training, as the recipe's 'validation' says; the best model goes "
        "to 'model-best' of the run folder",
    )
    p.add_argument(
        "--profile",
        metavar="FIRST:END",
        help="profile steps FIRST to END - 1, e.g. 10:20: a Chrome trace and a table per worker in 'profile'",
    )
    p.add_argument("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases")
    remote_command.add_submit_args(p)
    p.set_defaults(run=_train)


def _evaluate_args(verbs: Any) -> None:
    p = verbs.add_parser("evaluate", help="score a model on shards: one table, one JSON")
    model_arg(p)
    decoders_arg(p)
    device_arg(p, "cuda where torch finds a GPU, else cpu")
    dtype_arg(p)
    p.add_argument("--shards", required=True, help="shard folder of the held-out split")
    p.add_argument("--output", required=True, help="folder or URL for report.json and predictions.parquet")
    p.add_argument(
        "--tasks",
        type=comma_separated,
        help="tasks to score, comma separated (default: all that the split is annotated for)",
    )
    p.add_argument("--limit", type=int, help="score the first images only")
    exemplars_arg(p, "classes of the split that detect, segment and count ask for by example, instead of by name")
    p.add_argument(
        "--absent-classes",
        default="",
        metavar="CLASSES",
        help="names of things that no image shows, comma separated, or a .txt file of them: counts the boxes they get",
    )
    p.add_argument("--pictures", type=int, default=32, help="make pictures for the first images only (default: 32)")
    remote_command.add_submit_args(p)
    p.set_defaults(run=_evaluate)


def _calibrate_args(verbs: Any) -> None:
    p = verbs.add_parser("calibrate", help="fit a model's scores to a labelled split, so that they are probabilities")
    model_arg(p)
    decoders_arg(p)
    device_arg(p, "cuda where torch finds a GPU, else cpu")
    p.add_argument("--shards", required=True, help="shard folder of a labelled split that was not trained on")
    p.add_argument("--output", help="folder for a calibrated copy of the model (default: the model's own folder)")
    p.add_argument("--tasks", type=comma_separated, help="of detect, segment, count, ground, refer (default: all)")
    p.add_argument("--limit", type=int, help="use the first images only")
    p.set_defaults(run=_calibrate)


def _serve_args(verbs: Any) -> None:
    p = verbs.add_parser("serve", help="serve a model over HTTP with Ray Serve")
    p.add_argument("--config", default="nano", help="name in configs/serve, or a YAML file (default: nano)")
    p.add_argument("--model", help="model folder or name of bundled weights, instead of the config's")
    decoders_arg(p)
    p.add_argument("--host", help="address to listen on, instead of the config's")
    p.add_argument("--port", type=int, help="port to listen on, instead of the config's")
    p.add_argument("--check", action="store_true", help="check the config, also one for `serve deploy`, and end")
    p.add_argument("--new-key", metavar="NAME", help="make an API key, print its line for auth.keys_file, and end")
    remote_command.add_submit_args(p)
    p.set_defaults(run=_serve)


def _quickstart(args: argparse.Namespace) -> None:
    from lumen_ray.quickstart import quickstart

    quickstart(
        args.output,
        recipe_name=args.recipe,
        scenes=args.scenes,
        held_out=args.held_out,
        port=args.port,
        keep_serving=args.keep_serving,
    )


def _train(args: argparse.Namespace) -> None:
    recipe = api.load_recipe(args.recipe, args.workers)
    with bar(f"train {recipe.name}") as progress:
        report = TrainingReport(progress, recipe.total_steps, args.output)
        model = api.train(
            args.shards,
            args.output,
            recipe=recipe,
            init_from=args.init_from,
            validate=args.validate,
            profile=args.profile,
            wandb=args.wandb,
            progress=report.update,
            waiting=progress.line,
        )
        report.finish()
    say(f"model -> {model}; logs -> {args.output}/metrics.jsonl and {args.output}/tensorboard")


def _evaluate(args: argparse.Namespace) -> None:
    exemplars = api.load_exemplars(args.exemplars)
    engine = api.load_engine(args.model, decoders_by_task(args.decoders), args.device, args.dtype)
    from lumen_ray.evaluate.report import print_report

    with bar("evaluate") as progress:
        report = api.evaluate(
            engine,
            args.shards,
            args.output,
            tasks=args.tasks,
            limit=args.limit,
            pictures=args.pictures,
            exemplars=exemplars,
            absent_classes=_absent_classes(args.absent_classes),
            progress=progress.update,
        )
    print_report(report, console)
    say(f"report -> {args.output}/report.json")


def _absent_classes(given: str) -> list[str]:
    """The value of ``--absent-classes``. Raises `UserError` if it has no name."""
    names = class_names(given) if given else []
    if given and not names:
        raise UserError(f"--absent-classes '{given}' has no names; give some, or leave it out", "invalid_classes")
    return names


def _calibrate(args: argparse.Namespace) -> None:
    with bar("calibrate") as progress:
        fits = api.calibrate(
            args.model,
            args.shards,
            output=args.output,
            tasks=args.tasks,
            limit=args.limit,
            decoders=decoders_by_task(args.decoders),
            device=args.device,
            progress=progress.update,
        )
    for task, fit in fits.items():
        if fit.curve is None:
            wrong = fit.instances - fit.right
            say(f"{task}: no curve, since only {fit.right} instances are right and {wrong} wrong; its scores are kept")
            continue
        classes = f", own shifts of {len(fit.curve.classes)} classes" if fit.curve.classes else ""
        say(
            f"{task}: calibration error {fit.before:.3f} -> {fit.after:.3f} on these {fit.instances:,} instances "
            f"(slope {fit.curve.slope:.2f}, shift {fit.curve.shift:+.2f}{classes})"
        )
    say(f"curves -> {args.output or args.model}/meta.json")


def _serve(args: argparse.Namespace) -> None:
    if args.new_key is not None:
        from lumen_ray.serve.keys import new_key

        key, line = new_key(args.new_key)
        print(f"the key of {args.new_key}, shown only now: {key}", file=sys.stderr)
        print(line)  # alone on the output, so that >> puts it into the file
        return
    if args.check:
        from lumen_ray.serve.config_file import check_file

        check_file(args.config)
        say(f"serve: no mistakes in {args.config}")
        return
    settings = api.serve_settings(
        args.model, config=args.config, host=args.host, port=args.port, decoders=decoders_by_task(args.decoders)
    )
    from lumen_ray.serve.app import run

    say_bundled(settings.model)
    say("serve: starting")
    server = run(settings, blocking=False)
    say(f"serving {settings.model} at {server.url} (page at /, API at /docs); stop with Ctrl-C; log -> {server.log}")
    server.wait()
    server.stop()


def _warn_of_broken_decoders() -> None:
    """Names the decoders of other packages that cannot be used; all others can."""
    for problem in problems():
        print(f"lumen-ray: warning: {problem}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: the command's own or 0, or 2 for what the user must change."""
    prepare_environment()
    parser, verbs = _parser_and_verbs()
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else ""
    try:
        if verb and not verb.startswith("-") and verb not in verbs:
            raise UserError(f"unknown verb '{verb}';{suggest(verb, verbs)} verbs: {', '.join(verbs)}", "unknown_verb")
        job, argv = remote_command.split(argv) if verb in remote_command.SUBMITTED else (None, argv)
        args = parser.parse_args(argv)
        if not args.verb:
            parser.print_help()
            return EXIT_USER_ERROR
        if job is not None and job.address:
            return remote_command.submit(job, argv, args)
        if job is not None:
            remote_command.check_local(job, args)
        _warn_of_broken_decoders()
        return args.run(args) or 0
    except UserError as error:
        print(f"lumen-ray: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        hint = "; run the same command again to continue" if verb in RESUMABLE else ""
        print(f"lumen-ray: stopped{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
