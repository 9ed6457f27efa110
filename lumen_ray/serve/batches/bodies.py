"""Bodies and queries of `/v1/files` and `/v1/batches`, in OpenAI's format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.datastructures import UploadFile

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.serve import forms
from lumen_ray.wire import schemas
from lumen_ray.wire.chat import CHAT_URL

#: bytes of an upload besides its file
FORM_BYTES = 64 << 10
_WINDOW = re.compile(r"([1-9]\d{0,2})h", re.ASCII)
_MOST_HOURS = 720
_LONGEST_NAME = 255
#: of a form: a field of an object, as "expires_after[seconds]"
_NESTED = re.compile(r"(\w+)\[(\w+)\]", re.ASCII)

Name = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(max_length=512)]


class ExpiresAfter(Settings):
    """When a file is removed."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000, description="after the file was created")


class FileForm(Settings):
    """The fields of an upload beside its `file`."""

    purpose: str = Field(description="batch")
    expires_after: ExpiresAfter | None = Field(None, description="null: the server's retention, the most there is")

    @property
    def lifetime_s(self) -> int | None:
        return None if self.expires_after is None else self.expires_after.seconds


class FileQuery(Settings):
    """Which files are listed."""

    after: str | None = Field(None, description="id of the file before the first one listed")
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class BatchBody(Settings):
    """A batch to create."""

    input_file_id: str = Field(description="id of an uploaded file of chat requests")
    endpoint: str = Field(description=f"{CHAT_URL}, as in every line of the file")
    completion_window: str = Field(description=f"hours after which the batch expires: 24h, or 1h to {_MOST_HOURS}h")
    metadata: dict[Name, Text] | None = Field(None, max_length=16, description="kept with the batch")
    output_expires_after: ExpiresAfter | None = Field(None, description="of the output files")

    @property
    def output_lifetime_s(self) -> int | None:
        return None if self.output_expires_after is None else self.output_expires_after.seconds

    @property
    def window_s(self) -> int:
        """Raises `UserError`."""
        found = _WINDOW.fullmatch(self.completion_window)
        if found is None or int(found[1]) > _MOST_HOURS:
            raise UserError(
                f"completion_window '{self.completion_window}' is none; give hours as '24h', at most '{_MOST_HOURS}h'",
                "invalid_completion_window",
                "completion_window",
            )
        return 3600 * int(found[1])

    def check_endpoint(self) -> None:
        """Raises `UserError` for another endpoint than that of chat."""
        if self.endpoint != CHAT_URL:
            raise UserError(
                f"batches for endpoint '{self.endpoint}' are not answered; endpoints: {CHAT_URL}",
                "unsupported_endpoint",
                "endpoint",
            )


class BatchQuery(Settings):
    """Which batches are listed, newest first."""

    after: str | None = Field(None, description="id of the batch before the first one listed")
    limit: int = Field(20, ge=1, le=100)


def read_upload(items: Iterable[forms.Item]) -> tuple[UploadFile, str, FileForm]:
    """The file of a form, its name and the other fields. Raises `UserError`."""
    given = list(items)
    files = [value for field, value in given if field == "file"]
    if len(files) != 1 or not isinstance(upload := files[0], UploadFile):
        raise UserError("the form needs exactly one file 'file'; attach a file of requests", "missing_file", "file")
    fields = forms.read_fields((field, value) for field, value in given if field != "file")
    form = schemas.parse(FileForm, _nested(fields))
    if form.purpose != "batch":
        raise UserError(
            f"files for purpose '{form.purpose}' are not kept; purposes: batch", "unknown_purpose", "purpose"
        )
    name = upload.filename or "file.jsonl"
    if len(name) > _LONGEST_NAME:
        raise UserError(f"the file's name has {len(name)} characters; give at most {_LONGEST_NAME}", "invalid_name")
    if not upload.size:
        raise UserError("the file is empty; give one with a request per line", "empty_file", "file")
    return upload, name, form


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields named as "expires_after[seconds]" put together to objects."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if match := _NESTED.fullmatch(name):
            inner = found.setdefault(match[1], {})
            if isinstance(inner, dict):
                inner[match[2]] = value
        else:
            found[name] = value
    return found
