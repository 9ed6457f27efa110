"""Limits of a request, the defaults of its fields, and the images on the web that it may name."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from lumen_ray.config import Settings
from lumen_ray.errors import UserError

#: tokens of the longest text answer that a request can ask for
MAX_NEW_TOKENS = 1024
#: a name, which no IP address is: its last label begins with a letter
_HOST = re.compile(r"(\*\.)?([a-z0-9_-]+\.)*[a-z][a-z0-9-]*", re.ASCII)


class Limits(Settings):
    """Limits of a request; larger ones get a 4xx before any decoding or model work."""

    max_body_bytes: int = Field(20 * 1024 * 1024, ge=1024)
    max_pixels: int = Field(
        40_000_000, ge=1, description="width times height of an image, or of all images of one request together"
    )
    max_images: int = Field(
        8, ge=1, description="images of one request body: of a conversation, of several requests, or of examples"
    )
    max_messages: int = Field(
        1000, ge=1, description="messages of one conversation, with its calls of tools and their results"
    )
    max_choices: int = Field(8, ge=1, description="answers of one chat completion (n)")
    max_classes: int = Field(256, ge=1, description="phrases and examples of one request body, over all its tasks")
    max_requests: int = Field(32, ge=1, description="tasks of one /v1/infer call")
    max_request_tokens: int = Field(
        16_384,
        ge=1,
        description="tokens that one request body may cost: one for each byte of its classes, keypoints and texts, "
        "more in long names, and max_new_tokens for each answer in text",
    )
    max_text_chars: int = Field(2000, ge=1, description="characters of one text or name")
    max_history_chars: int = Field(
        20_000, ge=1, description="characters of system text and earlier turns of one request body together"
    )


class Defaults(Settings):
    """Defaults of a request's fields."""

    score_threshold: float = Field(0.3, ge=0, le=1)
    max_per_phrase: int = Field(300, ge=1, le=1000)
    max_new_tokens: int = Field(48, ge=1, le=MAX_NEW_TOKENS)


class RemoteImages(Settings):
    """Images that requests name by web addresses, as the ingress fetches them."""

    hosts: list[str] = Field(
        min_length=1, description="hosts that are asked, by name; '*.example.org' for all below example.org"
    )
    max_mb: int = Field(20, ge=1, description="MiB of all such images of one request together")
    timeout_s: float = Field(10, gt=0, description="seconds in which all of them have to be here")

    @field_validator("hosts")
    @classmethod
    def _names(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise UserError(
                    f"'{host}' is no name of a host; give it alone and in lower case, as 'images.example.org', or "
                    "'*.example.org' for all below it"
                )
        return hosts

    def allows(self, host: str) -> bool:
        """Whether a host may be asked; `host`: its name as in an address."""
        host = host.lower().removesuffix(".")
        return any(host == name or (name[0] == "*" and host.endswith(name[1:])) for name in self.hosts)
