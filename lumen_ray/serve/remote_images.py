"""Fetches the images that a request names by a web address.

Only from the hosts of the setting `remote_images`, and only from public addresses of these: a name is resolved once,
what it resolves to is checked, and that is what is connected to. A redirect is a new address, checked in the same way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from lumen_ray.errors import UserError
from lumen_ray.serve.http import logger
from lumen_ray.serve.metrics import STAGE_SECONDS
from lumen_ray.version import __version__
from lumen_ray.wire.settings import RemoteImages

_PORTS = (80, 443)
_REDIRECTS, _MOST_REDIRECTS = (301, 302, 303, 307, 308), 3
#: bytes are taken as they are: what a server compresses may be anything once it is unpacked
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": f"lumen_ray/{__version__}"}
#: not global by the registries of IANA, though `is_global` of some versions of Python says so
_NOT_GLOBAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20", "fec0::/10")
]


async def fetch_images(addresses: Mapping[str, str], settings: RemoteImages | None) -> dict[str, bytes]:
    """The bytes behind web addresses. `addresses`: with the place of each in the request; `settings`: None where
    nothing is fetched. Raises `UserError` for an address that is refused or does not answer, and for all together if
    they are too large or too slow."""
    if not addresses:
        return {}
    if settings is None:
        raise UserError(
            "remote image URLs are not fetched; send the image itself, as base64 or as a data URL",
            "remote_image_refused",
            next(iter(addresses.values())),
        )
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False)
    # no cookies, and by default no proxy or password of this process's environment
    session = aiohttp.ClientSession(
        connector=connector,
        headers=_HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
    )
    fetching = _Fetching(session, settings)
    async with session:
        try:
            with STAGE_SECONDS.timed(stage="fetch"):
                async with asyncio.timeout(settings.timeout_s), asyncio.TaskGroup() as group:
                    tasks = {
                        address: group.create_task(fetching.image(address, place))
                        for address, place in addresses.items()
                    }
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except TimeoutError:
            raise UserError(
                f"the remote images were not here within {settings.timeout_s:g} s; send the images themselves",
                "remote_image_failed",
            ) from None
    return {address: task.result() for address, task in tasks.items()}


class _Fetching:
    """The images of one request."""

    def __init__(self, session: aiohttp.ClientSession, settings: RemoteImages):
        self._session, self._settings = session, settings
        self._left = settings.max_mb << 20

    async def image(self, address: str, place: str) -> bytes:
        """The bytes behind an address and its redirects."""
        try:
            url = URL(address)
            for _ in range(_MOST_REDIRECTS + 1):
                self._check(url, place)
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status == 200:
                        return await self._body(response, place)
                    if response.status not in _REDIRECTS or "Location" not in response.headers:
                        raise _failed(place, f"was answered with status {response.status}; check the address")
                    url = url.join(URL(response.headers["Location"]))
        except UserError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            logger.info("an image at a web address was not fetched: %r", error)
            raise _failed(place, "could not be fetched; check the address, or send the image itself") from None
        raise _failed(place, f"is redirected more than {_MOST_REDIRECTS} times; give the address of the image")

    async def _body(self, response: aiohttp.ClientResponse, place: str) -> bytes:
        """The body of a response, of which no more is read than all images of the request may have."""
        body = bytearray()
        self._take(response.content_length or 0, place)
        self._left += response.content_length or 0
        async for chunk in response.content.iter_chunked(1 << 16):
            self._take(len(chunk), place)
            body.extend(chunk)
        return bytes(body)

    def _take(self, size: int, place: str) -> None:
        if size > self._left:
            most = self._settings.max_mb
            raise UserError(
                f"the images at web addresses have more than {most} MiB together; send smaller ones",
                "image_too_large",
                place,
            )
        self._left -= size

    def _check(self, url: URL, place: str) -> None:
        """Raises `UserError` unless an address may be asked."""
        if url.scheme not in ("http", "https") or url.port not in _PORTS:
            raise _refused(place, "must be one of http or https, at the usual port")
        if url.user is not None or url.password is not None:
            raise _refused(place, "must not have a user name or a password")
        if not self._settings.allows(url.raw_host or ""):
            raise _refused(place, f"is of none of the hosts that are allowed: {', '.join(self._settings.hosts)}")


class PublicResolver(ThreadedResolver):
    """Resolves names to the addresses that are connected to. Raises `UserError` if one of these is not public."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            logger.warning("the image host %s resolves to an address that is not public", host)
            raise UserError("the host of a remote image has no public address", "remote_image_refused")
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet and of a single machine: not private, loopback, link-local,
    shared (CGNAT), multicast or reserved, and no IPv6 form of an IPv4 address."""
    ip = ipaddress.ip_address(address)
    if ip.is_multicast or ip.is_reserved or not ip.is_global:
        return False
    return not any(ip in network for network in _NOT_GLOBAL)


def _refused(place: str, why: str) -> UserError:
    return UserError(f"the web address of '{place}' {why}", "remote_image_refused", place)


def _failed(place: str, why: str) -> UserError:
    return UserError(f"the web address of '{place}' {why}", "remote_image_failed", place)
