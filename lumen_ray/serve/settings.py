"""Settings of the Serve application, as under `args` in `configs/serve/*.yaml`.

Unknown keys are refused here, because Ray Serve accepts them silently."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lumen_ray.config import Settings
from lumen_ray.data.urls import is_url
from lumen_ray.decoders.registry import get
from lumen_ray.errors import UserError
from lumen_ray.structures import Dtype
from lumen_ray.wire.settings import Defaults, Limits, RemoteImages

#: requests that Serve hands to a replica beyond its limits, so that they are refused there
_REFUSED_AT_ONCE = 256
#: requests that wait in a caller for a replica, if even refusing is too slow, or there is none
_ANY = 4096
_ORIGIN = re.compile(r"https?://[^/\s*?#@]+", re.ASCII)


class Autoscaling(Settings):
    """The range of a deployment's replicas and the delays of scaling. Ray's defaults (30 s up, 600 s down) are slow."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    initial_replicas: int | None = Field(None, ge=0, description="replicas at the start; None for min_replicas")
    target_ongoing_requests: float = Field(4, gt=0, description="requests per replica that autoscaling aims at")
    upscale_delay_s: float = Field(3, ge=0, description="seconds of overload before a replica is added")
    downscale_delay_s: float = Field(60, ge=0, description="seconds of idleness before a replica is removed")

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError("give min_replicas <= initial_replicas <= max_replicas")
        return self


class Deployment(Settings):
    """Replicas, limits and resources of one deployment."""

    num_replicas: int | None = Field(None, ge=1, description="a fixed number of replicas, instead of `autoscaling`")
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(8, ge=1, description="requests a replica works on at a time, batches included")
    max_queued_requests: int = Field(
        32, ge=-1, description="requests that may wait in a replica; more get 503; -1: any"
    )
    num_cpus: float = Field(0.5, ge=0, description="logical CPUs a replica reserves")
    num_gpus: float = Field(0, ge=0, description="GPUs a replica reserves")
    health_check_period_s: float = Field(1, gt=0, description="seconds between Serve's health checks of a replica")
    health_check_timeout_s: float = Field(
        10, gt=0, description="seconds without an answer after which a health check has failed; three replace a replica"
    )

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Deployment:
        if self.num_replicas is not None and self.autoscaling is not None:
            raise ValueError("give num_replicas or autoscaling, not both")
        return self

    @property
    def min_replicas(self) -> int:
        return self.autoscaling.min_replicas if self.autoscaling else self.num_replicas or 1

    @property
    def max_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas or 1

    def in_serve(self) -> dict[str, int]:
        """The limits of Serve, which hands a replica all requests, also those that it refuses itself, see `room`."""
        more = _ANY if self.max_queued_requests < 0 else self.max_queued_requests + _REFUSED_AT_ONCE
        return {"max_ongoing_requests": self.max_ongoing_requests + more, "max_queued_requests": _ANY}

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `ray.serve.deployment`."""
        options: dict[str, Any] = {
            **self.in_serve(),
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "graceful_shutdown_wait_loop_s": 0.2,  # how often a stopping replica checks whether it is idle
        }
        if self.autoscaling:
            options["autoscaling_config"] = self.autoscaling.model_dump(exclude_none=True)
        else:
            options["num_replicas"] = self.num_replicas or 1
        return options


class Batching(Settings):
    """How requests of several callers share one forward pass."""

    max_batch_size: int = Field(8, ge=1, description="images of one pass")
    max_batch_tokens: int = Field(
        16_384,
        ge=1,
        description="tokens of one pass, counted as in limits.max_request_tokens; a request with more is alone",
    )
    batch_wait_timeout_s: float = Field(
        0, ge=0, description="seconds that the first request to an idle replica waits for others"
    )


class ModelDeployment(Deployment):
    """The deployment of the trunk or of a decoder."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda when the replica reserves a GPU")
    dtype: Dtype = Field("float32", description="of weights and arithmetic; bfloat16 takes half the memory")
    batching: Batching = Batching()
    not_ready_after_s: float = Field(
        60, gt=0, description="seconds of one pass of the model after which /readyz is 503"
    )
    replace_after_s: float = Field(
        300, gt=0, description="seconds of one pass of the model after which the replica is replaced"
    )

    @model_validator(mode="after")
    def _ready_before_replaced(self) -> ModelDeployment:
        if self.replace_after_s < self.not_ready_after_s:
            raise ValueError("replace_after_s must be at least not_ready_after_s")
        return self

    @model_validator(mode="after")
    def _batch_can_fill(self) -> ModelDeployment:
        if self.max_ongoing_requests < self.batching.max_batch_size:
            raise ValueError("max_ongoing_requests must be at least batching.max_batch_size, or no batch can fill")
        return self

    @property
    def torch_device(self) -> str:
        if self.device == "auto":
            return "cuda" if self.num_gpus > 0 else "cpu"
        return self.device

    @property
    def user_config(self) -> dict[str, Any]:
        """The settings that a replica takes without a restart."""
        return {
            **self.batching.model_dump(),
            "not_ready_after_s": self.not_ready_after_s,
            "replace_after_s": self.replace_after_s,
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
        }

    def options(self) -> dict[str, Any]:
        return {**super().options(), "user_config": self.user_config}


class TrunkDeployment(ModelDeployment):
    """The deployment of the trunk."""

    image_cache_mb: int = Field(
        256,
        ge=0,
        description="MiB of encoded images that a replica holds, for further requests about them; 0: none",
    )

    @property
    def user_config(self) -> dict[str, Any]:
        return {**super().user_config, "image_cache_mb": self.image_cache_mb}

    def options(self) -> dict[str, Any]:
        """With several replicas, requests about one image go to one of them, by their session id."""
        options = super().options()
        if self.image_cache_mb and self.max_replicas > 1:
            router = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
            options["request_router_config"] = {"request_router_class": router}
        return options


class Http(Settings):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all interfaces")
    port: int = Field(8000, ge=1, le=65535)
    request_timeout_s: float = Field(60, gt=0, description="seconds after which a request is given up with 504")
    access_log: bool = Field(False, description="a line in the ingress's log for every request")
    log_encoding: Literal["TEXT", "JSON"] = Field("TEXT", description="of the replicas' logs")
    cors_origins: list[str] = Field(
        [], description='origins whose pages may call the API, as "https://example.com"; "*" for all; none by default'
    )
    retries: int = Field(1, ge=0, le=5, description="times a request is repeated when a replica dies under it")
    retry_after_s: int = Field(1, ge=1, description="seconds named in Retry-After when the server is overloaded")

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UserError(
                    f"'{origin}' is no origin; give scheme, host and port alone, as 'https://example.com', or '*'"
                )
        return origins


class Auth(Settings):
    """API keys, and what each may do in a minute and at a time. The limits hold in each ingress replica."""

    keys_file: str = Field(description="YAML file of the keys' hashes, read again when it changes; see `keys`")
    requests_per_minute: int | None = Field(None, ge=1, description="of a key that names no other; None: any number")
    max_concurrent_requests: int | None = Field(None, ge=1, description="of a key that names no other; None: any")
    open_metrics: bool = Field(False, description="whether /metrics needs no key")


class Batches(Settings):
    """`/v1/files` and `/v1/batches`: where they are kept, and how much is taken."""

    folder: str = Field(description="folder of files and batches; a path that every node of the cluster sees")
    max_file_bytes: int = Field(200 << 20, ge=1024, description="bytes of an uploaded file")
    max_total_bytes: int = Field(10 << 30, ge=1024, description="bytes of all files; uploads above are refused")
    max_lines: int = Field(50_000, ge=1, description="requests of a batch")
    max_unfinished: int = Field(100, ge=1, description="batches of one key that are not done; more are refused")
    at_once: int = Field(2, ge=1, description="batches that are answered at a time; others wait")
    in_flight: int = Field(4, ge=1, le=32, description="requests that the model has at a time, of all batches together")
    retention_days: float = Field(
        30, gt=0, description="days after which files are removed, as are batches that ended so long ago"
    )
    num_cpus: float = Field(0.1, ge=0, description="logical CPUs that their one replica reserves")

    @field_validator("folder")
    @classmethod
    def _local(cls, folder: str) -> str:
        if not folder or is_url(folder):
            raise UserError(f"'{folder}' is no path; give a folder on a file system that every node sees")
        return folder


class Reload(Settings):
    """Following the model folder while it is served."""

    watch_s: float = Field(
        10, gt=0, description="seconds between looks at the model folder; a new version in it is served from then on"
    )


class Tracing(Settings):
    """OpenTelemetry spans, sent where OTEL_EXPORTER_OTLP_ENDPOINT says."""

    sampling_ratio: float = Field(1.0, ge=0, le=1, description="share of requests that are traced")


#: memory of a replica, at least: of its process, without a model
_REPLICA_BYTES = 200 << 20
#: logical resources of a replica
_RESERVED = ("num_cpus", "num_gpus")
#: of trunk and decoders, whose replicas are the ingress's in one process
_OF_A_REPLICA = ("num_replicas", "autoscaling", "health_check_period_s", "health_check_timeout_s")


class ServeSettings(Settings):
    """The whole application. `model`: the model folder that training wrote."""

    model: str
    topology: Literal["deployments", "one_process"] = Field(
        "deployments",
        description="deployments: ingress, trunk and every decoder have replicas of their own; one_process: each "
        "replica has all of them, for machines with one GPU",
    )
    http: Http = Http()
    auth: Auth | None = Field(None, description="who may use the server; None: everyone who reaches it")
    tracing: Tracing | None = Field(None, description="OpenTelemetry; None: off")
    batches: Batches | None = Field(None, description="files and batches in OpenAI's format; None: none are taken")
    remote_images: RemoteImages | None = Field(
        None, description="whether images at web addresses are fetched; None: they are refused"
    )
    reload: Reload | None = Field(
        None, description="whether a new version in the model folder is served; None: the version of the start is"
    )
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    ingress: Deployment = Deployment(max_ongoing_requests=64, max_queued_requests=128, num_cpus=0.5)
    trunk: TrunkDeployment = TrunkDeployment(num_cpus=1)
    decoders: dict[str, ModelDeployment] = Field({}, description="by decoder; those left out get the defaults")
    openai_sampling: bool = Field(
        False,
        description="/v1/chat/completions honours temperature, top_p, top_k, repetition_penalty and stop; otherwise it "
        "refuses values that would change a greedy answer",
    )
    serving: dict[str, str] = Field(
        {}, description="which decoder serves a task, as {TASK: DECODER}; for others the model's choice"
    )

    @field_validator("decoders")
    @classmethod
    def _known(cls, decoders: dict[str, ModelDeployment]) -> dict[str, ModelDeployment]:
        for name in decoders:
            get(name)
        return decoders

    @model_validator(mode="after")
    def _effective(self) -> ServeSettings:
        """Refuses settings that have no effect in one process."""
        if self.topology != "one_process":
            return self
        sections = {"trunk": self.trunk, **{f"decoders.{name}": section for name, section in self.decoders.items()}}
        for name, section in sections.items():
            if given := [field for field in _OF_A_REPLICA if field in section.model_fields_set]:
                raise UserError(
                    f"'{name}.{given[0]}' has no effect with topology 'one_process', whose replicas have the ingress, "
                    f"the trunk and all decoders; give '{given[0]}' in 'ingress', or choose topology 'deployments'",
                    "invalid_config",
                )
        if self.reload is not None:
            raise UserError(
                "'reload' needs replicas of trunk and decoders, which topology 'one_process' has not; leave it out, or "
                "choose topology 'deployments'",
                "invalid_config",
            )
        if "retries" in self.http.model_fields_set:
            raise UserError(
                "'http.retries' has no effect with topology 'one_process', in which the requests of a replica that "
                "dies end with it; leave it out, or choose topology 'deployments'",
                "invalid_config",
            )
        return self

    def decoder(self, name: str) -> ModelDeployment:
        """The deployment of one of the model's decoders."""
        return self.decoders.get(name, ModelDeployment(num_cpus=0.5))

    def deployments(self, decoders: Iterable[str]) -> dict[str, Deployment]:
        """The deployments of a model with these decoders, by name. The one of topology 'one_process' is `ingress` with
        the CPUs and GPUs of all sections. Raises `UserError` if these are more than one GPU."""
        sections = {"ingress": self.ingress, "trunk": self.trunk, **{name: self.decoder(name) for name in decoders}}
        if self.batches is not None:
            sections["batches"] = Deployment(num_cpus=self.batches.num_cpus)
        if self.topology == "deployments":
            return sections
        reserved = {field: round(sum(getattr(s, field) for s in sections.values()), 4) for field in _RESERVED}
        if reserved["num_gpus"] > 1:
            each = ", ".join(f"{name} {section.num_gpus:g}" for name, section in sections.items() if section.num_gpus)
            raise UserError(
                f"the sections reserve {reserved['num_gpus']:g} GPUs together ({each}), and a replica of topology "
                "'one_process' uses one; lower num_gpus to 1 in all, or choose topology 'deployments'",
                "invalid_config",
            )
        return {"one_process": self.ingress.model_copy(update=reserved)}

    def logical_cpus(self, decoders: Iterable[str]) -> int:
        """Logical CPUs that let every deployment of a model with these decoders reach its largest size."""
        deployments = self.deployments(decoders).values()
        return max(1, math.ceil(sum(d.num_cpus * d.max_replicas for d in deployments)))

    def check_memory(self, decoders: Iterable[str], has: int) -> None:
        """Raises `UserError` if a machine with so many bytes cannot hold the smallest number of replicas. A Ray that is
        started for them has as many logical CPUs as they need, so that `check_room` would find no fault."""
        needs = {name: d.min_replicas for name, d in self.deployments(decoders).items()}
        if (total := sum(needs.values())) * _REPLICA_BYTES > has:
            each = ", ".join(f"{name} {count}" for name, count in needs.items())
            raise UserError(
                f"the deployments begin with {total} replicas ({each}), more than the {has / 2**30:.0f} GiB of this "
                "machine can hold; lower num_replicas or min_replicas in the settings, or serve on a cluster",
                "no_room",
            )

    def check_room(self, decoders: Iterable[str], has: Mapping[str, float]) -> None:
        """Raises `UserError` if a Ray with so many "CPU" and "GPU" cannot hold the smallest number of replicas; Serve
        would wait for them in silence."""
        deployments = self.deployments(decoders)
        for key, field in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
            needs = {name: getattr(d, field) * d.min_replicas for name, d in deployments.items()}
            if (total := sum(needs.values())) > has[key]:
                each = ", ".join(f"{name} {count:g}" for name, count in needs.items() if count)
                raise UserError(
                    f"the deployments need {total:g} {key}s ({each}), but this Ray has {has[key]:g}; lower "
                    f"{field} or replicas in the settings, or serve on a Ray with more",
                    "no_room",
                )
