"""The verb `cluster render` of the command line: its options, and the files that it writes.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumen_ray.console import comma_separated, say
from lumen_ray.errors import UserError

#: how a rendered file begins
_HEADER = "# Rendered by lumen-ray "


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `cluster render`; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("cluster", help="render manifests for Kubernetes, sized for a preset")
    actions = p.add_subparsers(dest="action", metavar="ACTION", parser_class=parser_class, required=True)
    p = actions.add_parser("render", help="write KubeRay manifests whose sizes follow from what a preset needs")
    p.add_argument("--preset", required=True, help="name in configs/models")
    p.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the cluster; 0 with --overlay kind")
    p.add_argument(
        "--storage", required=True, metavar="PLACE", help="s3://bucket/folder, gs://..., or /data, the volume"
    )
    p.add_argument("--output", required=True, metavar="DIR", help="folder for the YAML files")
    p.add_argument(
        "--for",
        dest="verbs",
        type=comma_separated,
        metavar="PARTS",
        help="of prepare, train, evaluate, label, nightly, serve, interactive (default: the first four and serve)",
    )
    p.add_argument("--gpu", help="their kind, e.g. h100, a100 or l4 (default: h100)")
    p.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="GPUs of a node, and of a pod that trains (default: 8)"
    )
    p.add_argument("--overlay", help="where it runs: kind, eks, gke or none (default: none)")
    p.add_argument("--recipe", help="recipe of training: name or YAML file (default: that of the preset's name)")
    p.add_argument("--workers", type=int, metavar="N", help="workers of training, instead of the recipe's")
    p.add_argument("--cpus-per-gpu", type=int, metavar="N", help="CPUs of a pod for each GPU (default: what is needed)")
    p.add_argument(
        "--cpu-workers", type=int, metavar="N", help="most pods without a GPU (default: as in the manifests)"
    )
    p.add_argument("--namespace", help="namespace of all (default: lumen-ray)")
    p.add_argument("--image", help="image of the pods; without a tag, its -cpu and -cuda tags (default: lumen-ray)")
    p.add_argument("--secret", metavar="NAME", help="Secret with credentials of the store, which must exist")
    p.add_argument("--queue", metavar="NAME", help="Kueue's LocalQueue that training waits in (default: lumen-ray)")
    p.add_argument(
        "--history", action="store_true", default=None, help="add Ray's history server, with its logs in the bucket"
    )
    p.add_argument("--changes", type=Path, metavar="DIR", help="kustomization of your own, whose patches come last")
    p.add_argument(
        "--crds",
        type=Path,
        metavar="FILE",
        help="KubeRay's CRDs, of which unknown fields and wrong values are refused: the output of 'kubectl get crd "
        "rayclusters.ray.io rayjobs.ray.io rayservices.ray.io raycronjobs.ray.io -o yaml'",
    )
    p.set_defaults(run=_render)


def _render(args: argparse.Namespace) -> None:
    from lumen_ray.cluster.render import render
    from lumen_ray.cluster.request import RenderRequest

    options = set(RenderRequest.__dataclass_fields__)
    given = {name: value for name, value in vars(args).items() if name in options and value is not None}
    if args.verbs is not None:
        given["verbs"] = tuple(dict.fromkeys(args.verbs))
    folder = Path(args.output)
    files = render(RenderRequest(**given))
    _check_output(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    first, others = folder / "common.yaml", [name for name in files if name != "common.yaml"]
    say(f"{len(files)} files -> {folder}; start with 'kubectl apply -f {first}'; the others: {', '.join(others)}")


def _check_output(folder: Path, files: Mapping[str, str]) -> None:
    """Raises `UserError` if the files cannot be written, or would replace others than rendered ones."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file; give a folder", "invalid_output")
    for name in files:
        path = folder / name
        if path.exists() and not (path.is_file() and path.read_text(errors="replace").startswith(_HEADER)):
            raise UserError(
                f"'{path}' was not rendered by lumen-ray; give another --output, or move it", "invalid_output"
            )
