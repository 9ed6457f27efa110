"""Settings from YAML: alone in a file, or in a Serve config file, which `serve deploy` and RayService take too.

A Serve config file has the settings under `args` of an application whose import path is `lumen_ray.serve.app:build`.
Ray Serve accepts unknown keys silently, so they are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lumen_ray import config
from lumen_ray.errors import UserError, suggest
from lumen_ray.presets import find
from lumen_ray.serve.environment import prepare_serve_environment
from lumen_ray.serve.settings import ServeSettings

IMPORT_PATH = "lumen_ray.serve.app:build"
#: seconds by which the proxy's time-out lies above ours, so that a slow request gets our error body
PROXY_MARGIN_S = 10


def load_settings(
    name: str,
    *,
    model: str | None = None,
    host: str | None = None,
    port: int | None = None,
    serving: dict[str, str] | None = None,
) -> ServeSettings:
    """The settings in `configs/serve/<name>.yaml`, or in the YAML file `name`; the other arguments override them.

    The file has the settings alone, or is a Serve config file with one application. Raises `UserError` for missing
    files and invalid settings.
    """
    data = config.load_yaml(find("serve", name))
    if is_serve_file(data):
        data = settings_of(data, name)
    if model is not None:
        data["model"] = model
    http = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    for section, given in (("http", http), ("serving", serving or {})):
        if data.get(section) is None:
            data[section] = {}
        if isinstance(data[section], dict):  # validation refuses anything else
            data[section] |= given
    return config.validate(ServeSettings, data, name)


def check_file(name: str) -> None:
    """Raises `UserError` for mistakes in a file, as of `load_settings`, or in any Serve config file."""
    data = config.load_yaml(find("serve", name))
    if is_serve_file(data):
        check_serve_file(data, name)
    else:
        config.validate(ServeSettings, data, name)


def is_serve_file(data: Mapping[str, Any]) -> bool:
    """Whether the mapping of a YAML file is a Serve config, and not settings alone."""
    return "applications" in data


def settings_of(data: dict[str, Any], origin: str) -> dict[str, Any]:
    """The settings in a Serve config with one application, ours: its `args`, with the address of `http_options`.

    Raises `UserError` for other files, and for `deployments`, which Serve alone applies. `origin`: the file's name.
    """
    check_serve_file(data, origin)
    applications = data["applications"]
    if len(applications) != 1 or applications[0]["import_path"] != IMPORT_PATH:
        raise UserError(
            f"{origin}: `lumen-ray serve` runs one application with import_path '{IMPORT_PATH}'; use `serve deploy` "
            "for this file",
            "invalid_config",
        )
    if applications[0].get("deployments"):
        raise UserError(
            f"{origin}: `lumen-ray serve` does not apply 'applications.0.deployments'; give the same in "
            "'applications.0.args', or use `serve deploy`",
            "invalid_config",
        )
    args, options = applications[0]["args"], data.get("http_options") or {}
    http = {key: options[key] for key in ("host", "port") if key in options}
    if encoding := (data.get("logging_config") or {}).get("encoding"):
        http["log_encoding"] = encoding
    tracing = data.get("tracing_config") or {}
    traced = {"tracing": {"sampling_ratio": tracing.get("sampling_ratio", 1)}} if tracing.get("enabled") else {}
    return args | traced | {"http": (args.get("http") or {}) | http}


def check_serve_file(data: dict[str, Any], origin: str) -> None:
    """Raises `UserError` for what `serve deploy` would refuse, and for keys that it would ignore."""
    applications = data["applications"] if isinstance(data["applications"], list) else []
    ours = [(n, a) for n, a in enumerate(applications) if isinstance(a, dict) and a.get("import_path") == IMPORT_PATH]
    settings = {
        n: _checked_args(application.get("args"), f"{origin}: applications.{n}.args") for n, application in ours
    }
    prepare_serve_environment()
    from ray.serve.schema import ServeDeploySchema  # after what is checked without Ray, whose import takes seconds

    try:
        schema = ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise UserError(f"{origin}: '{place}' is invalid: {first['msg']}", "invalid_config") from None
    _refuse_unknown(ServeDeploySchema, data, origin)
    most = schema.http_options.request_timeout_s
    for n, found in settings.items():
        needed = found.http.request_timeout_s + PROXY_MARGIN_S
        if most is not None and most < needed:
            raise UserError(
                f"{origin}: 'http_options.request_timeout_s' is {most:g}; give at least {needed:g}, {PROXY_MARGIN_S} "
                f"more than 'applications.{n}.args.http.request_timeout_s', or null",
                "invalid_config",
            )


def _checked_args(args: Any, origin: str) -> ServeSettings:
    settings = config.validate(ServeSettings, args, origin)
    check_effective(settings, origin)
    return settings


def check_effective(settings: ServeSettings, origin: str) -> None:
    """Raises `UserError` for settings in a Serve config that would have no effect there: Serve has its own place for
    the address, the encoding of logs, and tracing."""
    given = settings.http.model_fields_set
    places = (
        ([f"'http.{name}'" for name in ("host", "port") if name in given], "http_options"),
        (["'http.log_encoding'"] if "log_encoding" in given else [], "logging_config"),
        (["'tracing'"] if settings.tracing is not None else [], "tracing_config"),
    )
    for names, place in places:
        if names:
            message = f"{origin}: {' and '.join(names)} would have no effect; give it in '{place}'"
            raise UserError(message, "invalid_config")


def _refuse_unknown(model: type[BaseModel], data: Mapping[str, Any], origin: str, place: str = "") -> None:
    """Raises `UserError` for the first key of `data`, or of mappings in it, that `model` does not have."""
    for key, value in data.items():
        if key not in model.model_fields:
            valid = sorted(model.model_fields)
            message = f"unknown key '{place}{key}';{suggest(str(key), valid)} valid keys: {', '.join(valid)}"
            raise UserError(f"{origin}: {message}", "invalid_config")
        for nested in _models_in(model.model_fields[key].annotation):
            items = {f"{key}.{n}": item for n, item in enumerate(value)} if isinstance(value, list) else {key: value}
            for name, item in items.items():
                if isinstance(item, Mapping):
                    _refuse_unknown(nested, item, origin, f"{place}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation such as `list[Model]` or `dict | Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
