// Calls of the server.
import { Picture } from "./picture.js"
import { changed } from "./state.js"

const KEY = "lumen-key" // in this tab until it is closed

export class ApiError extends Error {
  constructor(message, status, reason) {
    super(message)
    this.status = status
    this.reason = reason
  }
}

// Also below a path where a proxy serves the page.
export const address = path => new URL(path, document.baseURI).href

export const hasKey = () => Boolean(sessionStorage.getItem(KEY))
export const setKey = key => sessionStorage.setItem(KEY, key)

// An image in the place where a body has it in base64, or, with `isUrl`, as a data URL.
export class Sent {
  constructor(picture, isUrl = false) {
    this.picture = picture
    this.isUrl = isUrl
  }
}

// The body as JSON; `write(picture, isUrl)` gives the text of an image.
export function stringify(body, write, indent) {
  return JSON.stringify(body, (_, value) => {
    if (value instanceof Picture) return write(value, false)
    return value instanceof Sent ? write(value.picture, value.isUrl) : value
  }, indent)
}

export function picturesOf(body) {
  const found = new Set()
  stringify(body, picture => { found.add(picture); return "" })
  return [...found]
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY)
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) }
  let response
  try {
    response = await fetch(address(path), { ...options, headers })
  } catch (error) {
    if (error.name === "AbortError") throw error
    throw new ApiError("The server cannot be reached.", 0, "unreachable")
  }
  if (response.ok) return response
  const error = (await response.json().catch(() => null))?.error
  if (response.status === 401) changed("key")
  const message = error?.message || `The server answered ${response.status}.`
  throw new ApiError(sentence(message), response.status, error?.reason)
}

export async function get(path) { return (await call(path)).json() }

async function send(path, body, signal) {
  const pictures = picturesOf(body)
  await Promise.all(pictures.map(picture => picture.loadBase64()))
  const text = stringify(body, (picture, isUrl) => (isUrl ? picture.dataUrl : picture.base64))
  return call(path, { method: "POST", headers: { "content-type": "application/json" }, body: text, signal })
}

// A task. The image is named by its id where the server holds it.
export async function ask(path, body, signal) {
  const picture = body.image
  if (picture?.imageId) {
    const { image, ...rest } = body
    try {
      return await read(await send(path, { image_id: image.imageId, ...rest }, signal), picture)
    } catch (error) {
      if (error.status !== 410) throw error
      picture.imageId = null
    }
  }
  return read(await send(path, body, signal), picture)
}

async function read(response, picture) {
  const answer = await response.json()
  if (picture && answer.image_id) picture.imageId = answer.image_id
  return answer
}

// The objects of server-sent events until [DONE].
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal)
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  for (;;) {
    const { value, done } = await reader.read()
    if (done) throw new ApiError("The answer ended before it was complete.", 0, "incomplete")
    text += value
    const events = text.split("\n\n")
    text = events.pop()
    for (const event of events) {
      const data = event.replace(/^data: /, "")
      if (data === "[DONE]") return
      const piece = JSON.parse(data)
      if (piece.error) throw new ApiError(sentence(piece.error.message), 200, piece.error.reason)
      yield piece
    }
  }
}

function sentence(message) {
  const text = message[0].toUpperCase() + message.slice(1)
  return /[.!?]$/.test(text) ? text : `${text}.`
}
