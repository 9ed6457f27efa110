// Images as they are sent: a file itself, or a smaller copy where the server would refuse it.

const TAKEN = /^image\/(jpeg|png|webp)$/ // formats that the API promises to read
const SCALED_PIXELS = 16_000_000 // canvases of phones have no more

export class Picture {
  // `original`: {width, height} of the file if `blob` is a smaller copy; `url`: where a sample is.
  constructor(name, blob, bitmap, { original = null, url = null, isMade = false } = {}) {
    Object.assign(this, { name, blob, bitmap, original, url, isMade, imageId: null, dataUrl: null })
    this.width = bitmap.width
    this.height = bitmap.height
  }

  get base64() { return this.dataUrl.slice(this.dataUrl.indexOf(",") + 1) }

  // Whether the file that the user has differs from what is sent.
  get differs() { return Boolean(this.original) || this.isMade }

  async loadBase64() {
    this.dataUrl ??= await new Promise((resolve, reject) => {
      const reader = new FileReader()
      reader.onload = () => resolve(reader.result)
      reader.onerror = () => reject(reader.error)
      reader.readAsDataURL(this.blob)
    })
    return this.base64
  }
}

// The image in a file, within `limits` (max_pixels, max_body_bytes) of the server. Throws for what is no image.
export async function openPicture(file, limits, { name = file.name || "image.png", ...more } = {}) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null)
  if (!bitmap) {
    throw new Error(`${name} is not an image that this browser can read. Choose a JPEG, PNG or WebP file.`)
  }
  const mostBytes = Math.floor((limits.max_body_bytes - 16_384) * 0.75) // base64 adds a third, the rest needs room
  const isSmall = bitmap.width * bitmap.height <= limits.max_pixels && file.size <= mostBytes
  if (isSmall && TAKEN.test(file.type)) return new Picture(name, file, bitmap, more)
  return reencode(name, bitmap, isSmall ? Infinity : Math.min(limits.max_pixels, SCALED_PIXELS), mostBytes, more)
}

async function reencode(name, bitmap, mostPixels, mostBytes, more) {
  const stem = name.replace(/\.\w+$/, "")
  const original = { width: bitmap.width, height: bitmap.height }
  for (let scale = Math.min(1, Math.sqrt(mostPixels / (bitmap.width * bitmap.height))); ; scale *= 0.8) {
    const width = Math.max(1, Math.floor(bitmap.width * scale)), height = Math.max(1, Math.floor(bitmap.height * scale))
    const canvas = Object.assign(document.createElement("canvas"), { width, height })
    const context = canvas.getContext("2d")
    context.imageSmoothingQuality = "high"
    context.drawImage(bitmap, 0, 0, width, height)
    const isWhole = scale === 1 && mostPixels === Infinity
    const type = isWhole ? "image/png" : "image/jpeg"
    const blob = await new Promise(resolve => canvas.toBlob(resolve, type, 0.92))
    if (!blob) throw new Error(`${name} has too many pixels for this browser. Choose a smaller image.`)
    if (blob.size > mostBytes && width * height > 1) continue
    const copy = await createImageBitmap(canvas)
    bitmap.close()
    const given = scale === 1 ? {} : { original }
    return new Picture(`${stem}${isWhole ? ".png" : "-scaled.jpg"}`, blob, copy, { ...more, isMade: true, ...given })
  }
}

// A picture of the server's answer, PNG in base64.
export async function fromBase64(text, name) {
  const bytes = Uint8Array.from(atob(text), char => char.charCodeAt(0))
  const blob = new Blob([bytes], { type: "image/png" })
  return new Picture(name, blob, await createImageBitmap(blob), { isMade: true })
}
