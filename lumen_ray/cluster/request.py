"""What `lumen-ray cluster render` is asked for, checked as far as the options alone say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lumen_ray.cluster.manifests import OVERLAYS
from lumen_ray.cluster.nodes import check_offered
from lumen_ray.data import urls
from lumen_ray.errors import UserError, suggest, unknown
from lumen_ray.plan.gpus import Gpu, find_gpu

#: what can be rendered; the component `common` always is
VERBS = ("prepare", "train", "evaluate", "label", "nightly", "serve", "interactive")
DEFAULT_VERBS = ("prepare", "train", "evaluate", "label", "serve")
DEFAULT_GPU = "h100"
VOLUME = "/data"  # where the volume of the manifests is mounted
BUCKETS = ("s3", "gs")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[\w.:/-]+(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True)
class RenderRequest:
    """What to render.

    gpus: of the whole cluster, in nodes of `gpus_per_node`; 0: none, on kind. storage: a bucket, or a folder of the
    volume. recipe: of training; None: that of the preset's name. cpu_workers: pods for reading and preparing; None: as
    in the manifests. image: with a tag, of all pods; else of its -cpu and -cuda tags. overlay: one of `OVERLAYS`.
    changes: kustomization whose patches come last. crds: file with KubeRay's CRDs, to check against. history: whether
    with Ray's history server.
    """

    preset: str
    gpus: int
    storage: str
    verbs: tuple[str, ...] = DEFAULT_VERBS
    gpu: str = DEFAULT_GPU
    gpus_per_node: int = 8
    recipe: str | None = None
    workers: int | None = None
    cpus_per_gpu: int | None = None
    cpu_workers: int | None = None
    namespace: str = "lumen-ray"
    image: str = "lumen-ray"
    overlay: str = "none"
    secret: str | None = None
    queue: str = "lumen-ray"
    history: bool = False
    changes: Path | None = None
    crds: Path | None = None

    @property
    def kind_of_gpu(self) -> Gpu | None:
        """None without GPUs."""
        return find_gpu(self.gpu) if self.gpus else None

    @property
    def is_bucket(self) -> bool:
        return urls.is_url(self.storage)

    @property
    def shared(self) -> str:
        """Folder of what needs a file system: on the volume, also beside a bucket."""
        return VOLUME if self.is_bucket else self.storage.rstrip("/")

    def stored(self, *names: str) -> str:
        """The place of `names` in the storage."""
        return urls.join(self.storage, *names)

    @property
    def endpoint_port(self) -> int | None:
        """The port of a bucket's `endpoint_override`; None: that of HTTPS."""
        found = re.search(r"endpoint_override=[^&]*?:(\d+)(&|$)", urls.split(self.storage)[2])
        return int(found[1]) if found else None

    def check(self) -> None:
        """Raises `UserError` for options that are wrong by themselves, or contradict each other."""
        if self.overlay not in OVERLAYS:
            raise unknown("overlay", self.overlay, OVERLAYS)
        for verb in self.verbs:
            if verb not in VERBS:
                raise unknown("part", verb, VERBS)
        if not self.verbs:
            raise UserError(f"--for names nothing; give some of {', '.join(VERBS)}", "usage")
        _check_storage(self.storage)
        self._check_gpus()
        for option, name in (("--namespace", self.namespace), ("--queue", self.queue), ("--secret", self.secret)):
            if name is not None and not _NAME.fullmatch(name):
                raise UserError(
                    f"{option} '{name}' is no name in Kubernetes; give at most 63 lower-case letters, digits and "
                    "hyphens, with a letter or digit at both ends",
                    "invalid_name",
                )
        if not _IMAGE.fullmatch(self.image):
            raise UserError(
                f"--image '{self.image}' is no image; give one as registry/name or registry/name:tag", "usage"
            )
        if self.history and urls.split(self.storage)[0] not in ("s3", "gs"):
            raise UserError(
                f"the history server keeps logs in a bucket, and --storage is '{self.storage}'; give s3:// or gs://, "
                "or leave --history out",
                "invalid_storage",
            )

    def _check_gpus(self) -> None:
        if self.overlay == "kind":
            if self.gpus:
                raise UserError(f"--gpus is {self.gpus}, and kind's node has none; give --gpus 0", "no_gpus")
            return
        if self.gpus < 1:
            raise UserError(
                f"--gpus is {self.gpus}; give 1 or more: without a GPU only --overlay kind is rendered", "no_gpus"
            )
        check_offered(self.overlay, find_gpu(self.gpu).name)
        for option, number in (
            ("--gpus-per-node", self.gpus_per_node),
            ("--workers", self.workers),
            ("--cpus-per-gpu", self.cpus_per_gpu),
            ("--cpu-workers", self.cpu_workers),
        ):
            if number is not None and number < 1:
                raise UserError(f"{option} is {number}; give 1 or more", "invalid_setting")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            more = -(-self.gpus // self.gpus_per_node) * self.gpus_per_node
            raise UserError(
                f"{self.gpus} GPUs are no whole number of nodes with {self.gpus_per_node}; give --gpus {more}, or "
                "another --gpus-per-node",
                "uneven_nodes",
            )


def _check_storage(storage: str) -> None:
    """Raises `UserError` unless all pods would see it."""
    scheme, path, settings = urls.split(storage)
    if not scheme:
        if storage == VOLUME or storage.startswith(f"{VOLUME}/"):
            return
        raise UserError(
            f"the pods cannot see '{storage}'; give a bucket such as s3://bucket/folder, or a folder of the shared "
            f"volume such as {VOLUME}",
            "invalid_storage",
        )
    if scheme not in BUCKETS:
        hint = suggest(scheme, BUCKETS)
        raise UserError(
            f"--storage '{storage}' is no bucket that can be written;{hint} give s3:// or gs://, or {VOLUME}",
            "invalid_storage",
        )
    if re.search(r"^[^/]*:[^/]*@", path) or re.search(r"(^|&)(access_key|secret_key|session_token)=", settings):
        raise UserError(
            "--storage has credentials, which everyone would see in the manifests; put them into a Secret and give "
            "--secret NAME",
            "invalid_storage",
        )
    if not path.partition("/")[0]:
        raise UserError(
            f"--storage '{storage}' names no bucket; give one such as {scheme}://bucket/folder", "invalid_storage"
        )
