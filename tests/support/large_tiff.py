"""Tiled TIFF files with a flat background and a few bright squares, written without the whole image in memory."""

import zlib

import numpy as np

BACKGROUND = 40


def squares(side, number=5, size=200):
    """(x, y) of the top left corners of squares of `size` pixels, along the diagonal; none touches another."""
    step = (side - 2 * size) // number
    return [(size + n * step, size + n * step) for n in range(number)]


def write_large(path, side, tile=512, size=200, number=5):
    """Writes an RGB image of `side` x `side` pixels in Deflate tiles; returns the boxes (xyxy) of its squares."""
    import tifffile

    boxes = [(x, y, x + size, y + size) for x, y in squares(side, number, size)]
    flat = np.full((tile, tile, 3), BACKGROUND, np.uint8)
    encoded = zlib.compress(flat.tobytes(), 1)

    def tiles():
        for top in range(0, side, tile):
            for left in range(0, side, tile):
                inside = [b for b in boxes if b[0] < left + tile and b[2] > left and b[1] < top + tile and b[3] > top]
                if not inside:
                    yield encoded
                    continue
                pixels = flat.copy()
                for x1, y1, x2, y2 in inside:
                    pixels[max(y1 - top, 0) : y2 - top, max(x1 - left, 0) : x2 - left] = 250
                yield zlib.compress(pixels.tobytes(), 1)

    tifffile.imwrite(
        path, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(tile, tile), photometric="rgb", compression="zlib"
    )
    return boxes
