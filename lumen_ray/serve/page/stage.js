// The canvas: what it shows, at what scale and where.
import { announce, find, plural } from "./dom.js"
import { drawAnswer, drawCursor, drawImage, drawShape } from "./draw.js"
import { changed, on, state, takes, visible } from "./state.js"

const MARGIN = 12, MOST_SCALE = 32

// An image point p is at p * scale + (x, y) in CSS pixels of the canvas; `cursor`: the image point of the keyboard.
export const view = { scale: 1, x: 0, y: 0, cursor: null }

const canvas = find("view"), stage = find("stage")
let isWaiting = false

const fitScale = () => {
  const { width, height } = state.shown
  return Math.min((stage.clientWidth - 2 * MARGIN) / width, (stage.clientHeight - 2 * MARGIN) / height)
}

const isZoomed = () => Boolean(state.shown) && view.scale > fitScale() * 1.001

export function fit() {
  if (!state.shown) return
  view.scale = fitScale()
  keepInside()
}

// Zooms about a point of the canvas, its centre by default.
export function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  if (!state.shown) return
  const scale = Math.max(fitScale(), Math.min(MOST_SCALE, view.scale * factor)), by = scale / view.scale
  view.x = x - (x - view.x) * by
  view.y = y - (y - view.y) * by
  view.scale = scale
  keepInside()
}

export function pan(dx, dy) {
  view.x += dx
  view.y += dy
  keepInside()
}

// The image covers the stage where it is larger, and is centred where it is not.
function keepInside() {
  const { width, height } = state.shown, axes = [["x", stage.clientWidth, width], ["y", stage.clientHeight, height]]
  for (const [axis, room, side] of axes) {
    const size = side * view.scale
    view[axis] = size + 2 * MARGIN <= room ? (room - size) / 2
      : Math.min(MARGIN, Math.max(room - MARGIN - size, view[axis]))
  }
  redraw()
}

// The image point at a place in the window, within the image, to a tenth of a pixel.
export function imagePoint(clientX, clientY) {
  const box = canvas.getBoundingClientRect()
  return inside([(clientX - box.left - view.x) / view.scale, (clientY - box.top - view.y) / view.scale])
}

export function inside([x, y]) {
  const clamp = (value, most) => Math.round(Math.min(Math.max(value, 0), most) * 10) / 10
  return [clamp(x, state.shown.width), clamp(y, state.shown.height)]
}

export const showsAnswer = () => Boolean(state.answer?.instances) && state.shown === state.answer.picture

// What the pointer draws: "region", "example" (boxes), or nothing.
export function aim() {
  if (!state.shown) return null
  if (state.marking) return "example"
  return takes("region") && state.shown === state.picture && !find("task-panel").hidden ? "region" : null
}

export function redraw() {
  if (isWaiting) return
  isWaiting = true
  requestAnimationFrame(() => { isWaiting = false; draw() })
}

function draw() {
  if (!state.shown) return
  const ratio = window.devicePixelRatio || 1
  const width = Math.round(stage.clientWidth * ratio), height = Math.round(stage.clientHeight * ratio)
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height })
  const context = canvas.getContext("2d")
  context.setTransform(ratio, 0, 0, ratio, 0, 0)
  context.clearRect(0, 0, stage.clientWidth, stage.clientHeight)
  const at = { ...view, unit: 1, ratio }, hasAnswer = showsAnswer()
  const { on: isOn, opacity } = state.layers.picture
  if (isOn || !hasAnswer) drawImage(context, state.shown.bitmap, at, hasAnswer ? opacity : 1)
  if (hasAnswer) drawAnswer(context, visible(), at, look())
  drawShapes(context, at)
  canvas.classList.toggle("aims", Boolean(aim()))
  canvas.classList.toggle("moves", isZoomed()) // else a finger on it scrolls the page
  find("zoom-value").textContent = `${Math.round(view.scale * 100)} %`
}

export function look() {
  return { layers: state.layers, hover: state.hover, model: state.model, phrases: state.answer.phrases || [] }
}

function drawShapes(context, at) {
  for (const { examples } of state.classes) {
    for (const { box, positive, picture } of examples) {
      if (picture !== state.shown || find("examples-row").hidden) continue
      const shape = { kind: "box", points: [box.slice(0, 2), box.slice(2)] }
      drawShape(context, shape, at, positive ? "#fff" : "#ffb199", !positive)
    }
  }
  if (aim() === "region" && state.region && !state.drawing) drawShape(context, state.region, at, "#fff")
  if (state.drawing) drawShape(context, state.drawing, at, "#fff")
  if (aim() && view.cursor && document.activeElement === canvas) drawCursor(context, view.cursor, at)
}

function describe() {
  const { shown } = state, hadFocus = find("empty").contains(document.activeElement)
  canvas.hidden = !shown
  find("empty").hidden = Boolean(shown)
  find("bar").hidden = !shown
  if (!shown) return
  if (hadFocus) canvas.focus({ preventScroll: true }) // what had it is gone
  const found = showsAnswer() ? `, ${plural(visible().length, "object")} drawn` : ""
  const keys = aim() ? ". Arrow keys move the crosshair, Enter marks" : ". Plus and minus zoom, arrow keys move"
  canvas.setAttribute("aria-label", `${shown.name}, ${shown.width} by ${shown.height} pixels${found}${keys}`)
}

// The number of the smallest instance at an image point, -1 without any.
export function instanceAt([x, y]) {
  if (!showsAnswer()) return -1
  const area = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1)
  const there = visible().filter(({ box: [x1, y1, x2, y2] }) => x >= x1 && x <= x2 && y >= y1 && y <= y2)
  return there.sort((a, b) => area(a) - area(b))[0]?.index ?? -1
}

export function highlight(index) {
  if (index === state.hover) return
  state.hover = index
  changed("look")
}

export function startStage() {
  on("shown", () => { view.cursor = null; describe(); fit() })
  on("answer look filter region examples task", () => { describe(); redraw() })
  new ResizeObserver(() => fit()).observe(stage)
  find("zoom-in").onclick = () => { zoom(1.5); sayZoom() }
  find("zoom-out").onclick = () => { zoom(1 / 1.5); sayZoom() }
  find("zoom-fit").onclick = () => { fit(); sayZoom() }
}

// Where the stage is above what was just used, as on phones.
export function revealStage() {
  if (matchMedia("(max-width: 60rem)").matches) find("viewer").scrollIntoView()
}

export function sayZoom() { announce(`Zoom ${Math.round(view.scale * 100)} percent`) }
