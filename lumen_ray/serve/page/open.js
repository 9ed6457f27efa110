// Ways to bring an image to the page, and the strip of images to look at.
import { address, get } from "./api.js"
import { announce, find, make } from "./dom.js"
import { fromBase64, openPicture } from "./picture.js"
import { changed, on, state } from "./state.js"

export const FALLBACK_LIMITS = { max_pixels: 40_000_000, max_body_bytes: 20 * 1024 * 1024 }
const limits = () => state.model?.limits || FALLBACK_LIMITS
let opening = 0 // of several files the last one counts

export function show(picture) {
  state.shown = picture
  changed("shown")
}

// Makes a picture the one that is asked about. Results of the one before go; examples of classes stay.
export function useImage(picture) {
  state.picture = picture
  state.views = state.views.filter(view => view.isExample)
  Object.assign(state, { region: null, answer: null, request: null })
  find("problem").hidden = true
  changed("picture", "answer", "views")
  show(picture)
}

// Leaves the page without an image, and says why if there is a reason.
function clear(message = "") {
  Object.assign(state, { picture: null, region: null, answer: null, request: null, marking: null })
  state.views = state.views.filter(view => view.isExample)
  find("problem").textContent = message
  find("problem").hidden = !message
  changed("picture", "answer", "views")
  show(null)
}

// Says what went wrong without taking the image that is there.
function complain(message) {
  if (!state.shown) { clear(message); return }
  find("note").textContent = message
  find("note").hidden = false
  announce(message)
}

export async function openImage(file, more) {
  const turn = ++opening
  try {
    const picture = await openPicture(file, limits(), more)
    if (turn === opening) {
      useImage(picture)
      announce(`${picture.name}, ${picture.width} by ${picture.height} pixels`)
    }
  } catch (error) {
    if (turn === opening) clear(error.message)
  }
}

// Puts a picture on the strip and shows it.
export function addView(picture, label, isExample = false) {
  state.views.push({ picture, label, isExample })
  changed("views")
  show(picture)
}

// Puts pictures that were made on the strip, in place of earlier ones.
export async function showMade(images) {
  if (!images) return
  const pictures = await Promise.all(images.map((png, n) => fromBase64(png, `made-${n + 1}.png`)))
  state.views = state.views.filter(view => view.isExample)
  pictures.forEach((picture, n) => addView(picture, pictures.length > 1 ? `Made ${n + 1}` : "Made"))
  show(pictures[0])
}

async function openSample(number) {
  const path = `page/samples/${number}.jpg`
  const response = await fetch(address(path)).catch(() => null)
  if (!response?.ok) { clear("The sample could not be loaded."); return }
  await openImage(await response.blob(), { name: `sample-${number}.jpg`, url: address(path) })
}

async function listSamples() {
  const { samples } = await get("page/samples")
  find("samples").hidden = !samples.length
  find("sample-list").replaceChildren(...samples.map(({ number, description }) => {
    const image = make("img", { src: address(`page/samples/${number}.jpg`), alt: description, width: 88, height: 88 })
    return make("li", {}, make("button", { type: "button", onclick: () => openSample(number) }, image))
  }))
}

function arrangeStrip() {
  const pictures = [...(state.picture ? [{ picture: state.picture, label: "Image" }] : []), ...state.views]
  find("strip").hidden = pictures.length < 2
  find("strip").replaceChildren(...pictures.map(({ picture, label }) => {
    const button = make("button", { type: "button", onclick: () => show(picture) }, thumbnail(picture), label)
    button.setAttribute("aria-pressed", picture === state.shown)
    return make("li", {}, button)
  }))
}

// A small canvas of a picture, or of a box on it.
export function thumbnail(picture, [x1, y1, x2, y2] = [0, 0, picture.width, picture.height], side = 44) {
  const canvas = make("canvas", { width: 2 * side, height: 2 * side, className: "thumbnail" })
  const scale = Math.min(canvas.width / (x2 - x1), canvas.height / (y2 - y1))
  const width = (x2 - x1) * scale, height = (y2 - y1) * scale
  const place = [(canvas.width - width) / 2, (canvas.height - height) / 2, width, height]
  canvas.getContext("2d").drawImage(picture.bitmap, x1, y1, x2 - x1, y2 - y1, ...place)
  canvas.setAttribute("aria-hidden", "true")
  return canvas
}

function note() {
  const { picture } = state
  const isScaled = Boolean(picture?.original) && state.shown === picture
  find("note").hidden = !isScaled
  if (!isScaled) return
  const { width, height } = picture.original
  find("note").textContent = `${width} × ${height} pixels are more than this server takes. The image is sent, and `
    + `answered, at ${picture.width} × ${picture.height}.`
}

// Takes a file of a drop or a paste, if it has one.
function take(transfer, more) {
  const file = [...(transfer?.files || [])][0]
  if (file) openImage(file, more)
  return Boolean(file)
}

export function startOpening() {
  for (const id of ["open", "choose"]) find(id).onclick = () => find("file").click()
  find("use-made").onclick = () => {
    const made = state.views.filter(view => !view.isExample).map(view => view.picture)
    useImage(made.includes(state.shown) ? state.shown : made[0])
  }
  find("close").onclick = () => { clear(); find("choose").focus() }
  find("file").onchange = () => {
    if (find("file").files[0]) openImage(find("file").files[0])
    find("file").value = "" // the same file may be chosen again
  }
  const stage = find("stage")
  // text that is dragged elsewhere is none of the stage's
  const isMeant = event => event.dataTransfer.types.includes("Files") || stage.contains(event.target)
  document.ondragover = event => {
    if (!isMeant(event)) return
    event.preventDefault()
    stage.classList.add("over")
  }
  document.ondragleave = event => { if (!event.relatedTarget) stage.classList.remove("over") }
  document.ondrop = event => {
    if (!isMeant(event)) return
    event.preventDefault()
    stage.classList.remove("over")
    if (!take(event.dataTransfer)) complain("That was no file. Save the image first, then drop or choose its file.")
  }
  document.onpaste = event => { if (take(event.clipboardData, { isMade: true })) event.preventDefault() }
  on("views shown picture", arrangeStrip)
  on("shown", note)
  return listSamples().catch(() => {}) // without samples the page works too
}
