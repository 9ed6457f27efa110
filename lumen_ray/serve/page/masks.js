// COCO's run-length masks.

const LONGEST_SIDE = 1400 // of what is drawn; masks of larger images are sampled

// The run lengths in a compressed string, background first, down the columns. A character has 5 bits and a sixth for
// "more follows"; from the third run on a value is the difference to the run two before.
export function runsOf(counts) {
  const runs = []
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, code
    do {
      code = counts.charCodeAt(at++) - 48
      value |= (code & 31) << shift
      shift += 5
    } while (code & 32)
    if (code & 16 && shift < 32) value |= -1 << shift
    runs.push(value + (runs.length > 2 ? runs[runs.length - 2] : 0))
  }
  return runs
}

export function maskArea(mask) {
  return runsOf(mask.counts).reduce((area, run, index) => area + (index % 2 ? run : 0), 0)
}

// Calls `use(column, first row, row behind the last)` for each piece of a column inside the mask.
function eachPiece(mask, use) {
  const height = mask.size[0]
  let at = 0
  runsOf(mask.counts).forEach((run, index) => {
    for (let start = at, end = at + run; index % 2 && start < end;) {
      const column = Math.floor(start / height), stop = Math.min(end, (column + 1) * height)
      use(column, start - column * height, stop - column * height)
      start = stop
    }
    at += run
  })
}

function bounds(mask) {
  let left = Infinity, top = Infinity, right = 0, bottom = 0
  eachPiece(mask, (column, first, end) => {
    left = Math.min(left, column)
    right = Math.max(right, column + 1)
    top = Math.min(top, first)
    bottom = Math.max(bottom, end)
  })
  return { left, top, right, bottom }
}

const drawn = new WeakMap() // mask -> {css, canvas, x, y, width, height}

// A canvas with the mask in a colour, and the place (x, y, width, height) in the image where it belongs; null if empty.
export function maskCanvas(mask, colour) {
  const known = drawn.get(mask)
  if (known?.css === colour.css) return known
  const { left, top, right, bottom } = bounds(mask)
  if (right <= left) return null
  const stride = Math.max(1, Math.ceil(Math.max(...mask.size) / LONGEST_SIDE))
  const width = Math.ceil((right - left) / stride), height = Math.ceil((bottom - top) / stride)
  const bits = new Uint8Array(width * height)
  eachPiece(mask, (column, first, end) => {
    if ((column - left) % stride) return
    const x = (column - left) / stride
    for (let y = Math.ceil((first - top) / stride); y * stride + top < end; y++) bits[y * width + x] = 1
  })
  const canvas = Object.assign(document.createElement("canvas"), { width, height })
  canvas.getContext("2d").putImageData(coloured(bits, width, height, colour.rgb), 0, 0)
  const made = { css: colour.css, canvas, x: left, y: top, width: width * stride, height: height * stride }
  drawn.set(mask, made)
  return made
}

// Half transparent, with an edge.
function coloured(bits, width, height, rgb) {
  const image = new ImageData(width, height), [red, green, blue] = rgb, colour = red | green << 8 | blue << 16
  const pixels = new Uint32Array(image.data.buffer) // a byte for each of red, green, blue and alpha, red first
  for (let at = 0; at < bits.length; at++) {
    if (!bits[at]) continue
    const x = at % width
    const isInside = x && x < width - 1 && bits[at - 1] && bits[at + 1] && bits[at - width] && bits[at + width]
    pixels[at] = colour | (isInside ? 115 : 230) << 24
  }
  return image
}
