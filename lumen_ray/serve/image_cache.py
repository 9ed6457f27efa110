"""Images that a trunk replica holds encoded, so that further requests about them need not encode them again.

Keys are hashes of the encoded bytes (`image_id`). Serve's consistent-hash router sends requests about one image to one
replica; a replica that joins takes over its share of the keys alone.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.serve.metrics import IMAGE_BYTES, IMAGE_LOOKUPS
from lumen_ray.structures import Size

if TYPE_CHECKING:
    from lumen_ray.inference.encoded_images import EncodedImages


def image_id(encoded: bytes) -> str:
    """The id of an image: 32 hexadecimal digits of the SHA-256 of its encoded bytes."""
    return hashlib.sha256(encoded).hexdigest()[:32]


class ImageGone(UserError):
    """A replica no longer holds the image that it was asked about."""

    def __init__(self, message: str, reason: str = "image_gone", field: str | None = None):
        super().__init__(message, reason, field)


def gone(image_id: str) -> ImageGone:
    return ImageGone(f"image '{image_id}' is not held any more; send the image itself again", field="image_id")


@dataclass(frozen=True)
class KeyedImage:
    """An image by its id. `size`: (height, width) as stored; `picture`: None where a replica should hold it."""

    image_id: str
    size: Size
    picture: Picture | None = None


class ImageCache:
    """The last images that were asked about, up to `max_bytes`. Thread-safe."""

    def __init__(self, max_bytes: int = 0):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._images: OrderedDict[str, EncodedImages] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, image_id: str) -> EncodedImages | None:
        """The image, which is now the last to be dropped; None if it is not held."""
        with self._lock:
            found = self._images.get(image_id)
            IMAGE_LOOKUPS.record(result="miss" if found is None else "hit")
            if found is not None:
                self._images.move_to_end(image_id)
            return found

    def put(self, image_id: str, image: EncodedImages) -> None:
        """Holds a single image, and drops those that were not asked about for longest. One that is larger than all the
        room is not held."""
        with self._lock:
            if image_id in self._images:
                return
            self._images[image_id] = image
            self.nbytes += image.nbytes
            self._shrink()

    def resize(self, max_bytes: int) -> None:
        """Changes the room."""
        with self._lock:
            self.max_bytes = max_bytes
            self._shrink()

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._images

    def size_of(self, image_id: str) -> Size | None:
        """(height, width) of a held image as stored; None if it is not held."""
        with self._lock:
            found = self._images.get(image_id)
            return None if found is None else found.inputs.images[0].size

    def _shrink(self) -> None:
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._images.popitem(last=False)[1].nbytes
        IMAGE_BYTES.record(self.nbytes)
