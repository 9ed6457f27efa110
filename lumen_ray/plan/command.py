"""The verb `plan` of the command line: its options and its output. It plans jobs of `label`.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray.console import comma_separated, say
from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from lumen_ray.plan.recording import Recording
    from lumen_ray.plan.settings import LabelJob
    from lumen_ray.plan.work import ModelWork

DEFAULT_TASKS, DEFAULT_CLASSES, DEFAULT_BATCH = ("detect",), 80, 8


def add_args(verbs: Any) -> None:
    """The verb's options; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("plan", help="predict time, cost and bottleneck of labelling a corpus on a cluster")
    model = p.add_mutually_exclusive_group()
    model.add_argument("--preset", help="model to plan for: name in configs/models, or a YAML file")
    model.add_argument("--model", help="the same: model folder, or the name of bundled weights")
    p.add_argument("--images", metavar="N", help="number of images, e.g. 250000, 100k or 100M")
    p.add_argument("--tasks", type=comma_separated, help="tasks, comma separated (default: the recording's, or detect)")
    p.add_argument("--classes", type=int, metavar="N", help="number of classes (default: the recording's, or 80)")
    p.add_argument("--gpus", type=int, metavar="N", help="GPUs of the cluster, each with an actor")
    p.add_argument("--within", type=float, metavar="HOURS", help="instead of --gpus: the fewest that need no longer")
    p.add_argument("--gpu", help="their kind, e.g. h100, a100 or l4 (default: h100)")
    p.add_argument("--cpus-per-gpu", type=float, default=12, metavar="N", help="CPUs for each of them (default: 12)")
    p.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    p.add_argument("--actors", type=int, metavar="N", help="instead of --gpus: actors on the CPUs of one machine")
    p.add_argument("--cores", type=int, metavar="N", help="its cores, with --actors (default: the recording's)")
    p.add_argument("--image-mb", type=float, metavar="MB", help="mean size (default: the recording's, or 0.5)")
    p.add_argument("--megapixels", type=float, metavar="N", help="mean size (default: the recording's, or 2)")
    p.add_argument("--storage-gbps", type=float, metavar="N", help="Gbit/s of the images' store (default: no limit)")
    p.add_argument("--usd-per-hour", type=float, metavar="USD", help="price of a GPU, or of the machine")
    p.add_argument("--losses-per-hour", type=float, default=0.0, metavar="N", help="spot nodes lost (default: 0)")
    p.add_argument("--batch-size", type=int, metavar="N", help="images per pass (default: the recording's, or 8)")
    p.add_argument("--dtype", help="float32 or bfloat16 (default: bfloat16, with a recording its own)")
    p.add_argument("--mfu", type=float, default=0.35, help="share of the GPU's peak that is reached (default: 0.35)")
    p.add_argument("--answer-tokens", type=int, default=24, metavar="N", help="of an answer in text (default: 24)")
    p.add_argument("--recorded", metavar="FILE", help="replay the stage times of a recording")
    p.add_argument("--calibrate", metavar="DIR", help="record stage times here, with --model on images of this folder")
    p.add_argument("--output", default="recording.json", help="file of --calibrate (default: recording.json)")
    p.add_argument("--device", help="device of --calibrate: cpu or cuda (default: cuda where there is one)")
    p.add_argument("--seed", type=int, default=0, help="of the simulation (default: 0)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    recording, is_new = None, args.calibrate is not None
    if is_new:
        recording = _calibrate(args)
    elif args.recorded:
        from lumen_ray.plan.recording import Recording

        recording = Recording.load(Path(args.recorded))
    if is_new and args.images is None:
        return
    from lumen_ray.plan.report import fewest_gpus, plan_label, print_report
    from lumen_ray.plan.settings import check_memory, stage_times

    job, work = _job(args, None if is_new else args.preset or args.model, recording)
    if job.gpus:
        check_memory(work, job)
    times = stage_times(job, work, recording)
    if args.within is not None:
        job = fewest_gpus(job, times, args.within)
    report = plan_label(job, times, work)
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report)


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for options that contradict each other or have no sense."""
    if args.images is None and args.calibrate is None:
        raise UserError("nothing to plan: give --images N, or --calibrate DIR to record stage times", "usage")
    if args.recorded and args.calibrate:
        raise UserError("--recorded replays a recording and --calibrate makes one; give one of them", "usage")
    if args.calibrate and args.preset:
        raise UserError("--calibrate measures a model with weights; give --model instead of --preset", "usage")
    output = Path(args.output)
    if args.calibrate and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output '{output}' cannot be written; give a file in a folder that exists", "invalid_output")
    least = {
        "gpus_per_node": 1, "cpus_per_gpu": 1, "actors": 1, "cores": 1, "batch_size": 1, "answer_tokens": 1,
        "classes": 1, "losses_per_hour": 0, "usd_per_hour": 0,
    }  # fmt: skip
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and not given >= value:
            raise UserError(f"--{name.replace('_', '-')} is {given:g}; give {value} or more", "invalid_setting")
    for name in ("image_mb", "megapixels", "storage_gbps", "within"):
        given = getattr(args, name)
        if given is not None and not 0 < given < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {given:g}; give more than 0", "invalid_setting")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu is {args.mfu:g}; give a share of the GPU's peak, more than 0 and at most 1", "usage")


def _calibrate(args: argparse.Namespace) -> Recording:
    from lumen_ray.plan.calibrate import calibrate
    from lumen_ray.presets import DEFAULT_MODEL

    recording = calibrate(
        args.calibrate,
        model=args.model or DEFAULT_MODEL,
        tasks=args.tasks or DEFAULT_TASKS,
        classes=None if args.classes is None else [f"object {n}" for n in range(args.classes)],
        device=args.device,
        dtype=args.dtype or "float32",
        batch_size=args.batch_size or DEFAULT_BATCH,
        say=(lambda line: None) if args.json else lambda line: say(f"calibrate: {line}"),
    )
    recording.save(Path(args.output))
    if not args.json:
        say(f"recording -> {args.output}; replay it with 'lumen-ray plan --recorded {args.output} --images N ...'")
    return recording


def _job(args: argparse.Namespace, model: str | None, recording: Recording | None) -> tuple[LabelJob, ModelWork]:
    """The job, and the model's work."""
    from lumen_ray.plan.gpus import find_gpu
    from lumen_ray.plan.settings import IMAGE_MB, MEGAPIXELS, LabelJob, parse_count, read_model
    from lumen_ray.plan.work import count_work
    from lumen_ray.structures import check_dtype

    images = parse_count(args.images)
    if model is None and recording is None:
        raise UserError("no model is given; give --preset NAME, --model DIR or --recorded FILE", "usage")
    is_computed = model is not None or (args.gpu is not None and recording is not None)
    gpus, actors = _numbers(args, recording, is_computed)
    if recording is not None and not is_computed:
        _check_recorded(args, recording)
    of = recording or argparse.Namespace(
        tasks=DEFAULT_TASKS, num_classes=DEFAULT_CLASSES, batch_size=DEFAULT_BATCH, dtype="bfloat16", cores=1,
        image_bytes=IMAGE_MB * 1e6, megapixels=MEGAPIXELS,
    )  # fmt: skip
    tasks, classes = tuple(args.tasks or of.tasks), args.classes or of.num_classes
    if model is not None:
        work = count_work(read_model(args.preset, args.model), tasks, classes, args.answer_tokens)
    else:
        assert recording is not None
        work = recording.model_work()
    job = LabelJob(
        images=images,
        tasks=tasks,
        num_classes=classes,
        gpus=gpus,
        actors=actors,
        gpu=find_gpu(args.gpu or "h100") if is_computed else None,
        cores=args.cores or of.cores,
        cpus_per_gpu=args.cpus_per_gpu,
        gpus_per_node=args.gpus_per_node,
        image_mb=args.image_mb or of.image_bytes / 1e6,
        megapixels=args.megapixels or of.megapixels,
        storage=None if args.storage_gbps is None else args.storage_gbps * 1e9 / 8,
        usd_per_hour=args.usd_per_hour,
        losses_per_hour=args.losses_per_hour,
        batch_size=args.batch_size or of.batch_size,
        dtype=check_dtype(args.dtype or ("bfloat16" if is_computed else of.dtype)),
        mfu=args.mfu,
        seed=args.seed,
    )
    return job, work


def _numbers(args: argparse.Namespace, recording: Recording | None, is_computed: bool) -> tuple[int, int]:
    """(GPUs, actors without one)."""
    if (args.gpus is not None) + (args.actors is not None) + (args.within is not None) > 1:
        raise UserError(
            "give one of --gpus, --within, which finds their number, and --actors, for a machine without GPUs", "usage"
        )
    if args.within is not None:
        return 1, 0
    if args.actors is not None:
        if recording is None or is_computed or recording.device != "cpu":
            raise UserError(
                "--actors plans for CPUs, whose rate cannot be computed from a preset; give --recorded FILE of a "
                "calibration on such a machine alone, or --gpus N",
                "usage",
            )
        return 0, args.actors
    if args.gpus is None or args.gpus < 1:
        given = "--gpus is not given" if args.gpus is None else f"--gpus is {args.gpus}"
        raise UserError(
            f"{given}; give 1 or more, --within HOURS, or --actors N with --recorded FILE for a machine without GPUs",
            "no_gpus",
        )
    return args.gpus, 0


def _check_recorded(args: argparse.Namespace, recording: Recording) -> None:
    """Raises `UserError` for options other than those that the model was recorded with."""
    for option, given, was in (
        ("--tasks", args.tasks, recording.tasks),
        ("--classes", args.classes, recording.num_classes),
        ("--batch-size", args.batch_size, recording.batch_size),
        ("--dtype", args.dtype, recording.dtype),
    ):
        if given is not None and given != was:
            shown = ",".join(was) if isinstance(was, list) else was
            raise UserError(
                f"the recording's model ran with {option} {shown}; leave {option} out, record again, or give --preset "
                "to compute the model's time",
                "other_settings",
            )
