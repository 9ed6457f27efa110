// Pointer, wheel and keys on the canvas: they draw regions and examples, zoom and move.
import { announce, find } from "./dom.js"
import { aim, fit, highlight, imagePoint, inside, instanceAt, pan, redraw, sayZoom, view, zoom } from "./stage.js"
import { changed, on, state } from "./state.js"

const canvas = find("view")
const LEAST_DRAG = 6 // CSS pixels; a shorter one is a click
const pointers = new Map() // id -> [clientX, clientY]
let start = null // the image point where a shape began
let use = () => {} // takes what was drawn

const isScribble = () => aim() === "region" && state.tool === "scribble"

function begin(point) {
  start = point
  state.drawing = { kind: isScribble() ? "scribble" : "point", points: [point] }
  redraw()
}

function extend(point) {
  if (isScribble()) state.drawing.points.push(point)
  else state.drawing = shapeTo(point)
  redraw()
}

function shapeTo([x, y]) {
  const [u, v] = start, sides = [Math.abs(x - u), Math.abs(y - v)]
  const isBox = Math.max(...sides) * view.scale > LEAST_DRAG && Math.min(...sides) > 0
  if (!isBox) return { kind: "point", points: [start] }
  return { kind: "box", points: [[Math.min(x, u), Math.min(y, v)], [Math.max(x, u), Math.max(y, v)]] }
}

function finish() {
  const drawn = state.drawing
  cancel()
  if (drawn.kind === "scribble" && drawn.points.length < 2) use({ kind: "point", points: drawn.points })
  else use(drawn)
}

function cancel() {
  start = state.drawing = null
  redraw()
}

function pinch(event) {
  const before = [...pointers.values()]
  pointers.set(event.pointerId, [event.clientX, event.clientY])
  const after = [...pointers.values()], box = canvas.getBoundingClientRect()
  const middle = ([[a, b], [c, d]]) => [(a + c) / 2, (b + d) / 2]
  const apart = ([[a, b], [c, d]]) => Math.hypot(a - c, b - d)
  const [x, y] = middle(after), [u, v] = middle(before)
  pan(x - u, y - v)
  zoom(apart(after) / Math.max(1, apart(before)), x - box.left, y - box.top)
}

canvas.onpointerdown = event => {
  if (event.button === 2) return
  pointers.set(event.pointerId, [event.clientX, event.clientY])
  canvas.setPointerCapture(event.pointerId)
  if (pointers.size > 1) cancel()
  else if (aim() && event.button === 0 && !event.shiftKey) begin(imagePoint(event.clientX, event.clientY))
}

canvas.onpointermove = event => {
  const from = pointers.get(event.pointerId)
  if (!from) { highlight(aim() ? -1 : instanceAt(imagePoint(event.clientX, event.clientY))); return }
  if (pointers.size > 1) { pinch(event); return }
  pointers.set(event.pointerId, [event.clientX, event.clientY])
  if (state.drawing) extend(imagePoint(event.clientX, event.clientY))
  else if (!aim() || event.shiftKey || event.buttons & 4) pan(event.clientX - from[0], event.clientY - from[1])
}

canvas.onpointerup = event => {
  const isLast = pointers.size === 1
  pointers.delete(event.pointerId)
  if (isLast && state.drawing) finish()
  else if (isLast && event.pointerType === "touch" && !aim()) {
    highlight(instanceAt(imagePoint(event.clientX, event.clientY)))
  }
}
canvas.onpointercancel = event => { pointers.delete(event.pointerId); cancel() }
canvas.onpointerleave = event => { if (!pointers.has(event.pointerId) && event.pointerType === "mouse") highlight(-1) }
canvas.addEventListener("wheel", event => {
  event.preventDefault()
  const box = canvas.getBoundingClientRect()
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - box.left, event.clientY - box.top)
}, { passive: false })

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }

canvas.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.shown) return
  const scaled = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key]
  if (scaled) { zoom(scaled); sayZoom() }
  else if (event.key === "0") { fit(); sayZoom() }
  else if (event.key in ARROWS) arrow(...ARROWS[event.key], event.shiftKey)
  else if (event.key === "Escape" && state.drawing) { cancel(); announce("Cancelled") }
  else if (aim() && (event.key === "Enter" || event.key === " ")) mark(event.shiftKey)
  else return
  event.preventDefault()
}

function arrow(dx, dy, isFar) {
  if (!aim()) { pan(-60 * dx, -60 * dy); return }
  const step = (isFar ? 60 : 10) / view.scale, [x, y] = cursor()
  view.cursor = inside([x + dx * step, y + dy * step])
  if (state.drawing && !isScribble()) state.drawing = shapeTo(view.cursor)
  announce(`${Math.round(view.cursor[0])}, ${Math.round(view.cursor[1])}`)
  redraw()
}

function cursor() { return view.cursor || inside([state.shown.width / 2, state.shown.height / 2]) }

// Enter begins a shape; the second one ends a box, or a point where the crosshair has not moved. A scribble goes on
// until Shift and Enter.
function mark(ends) {
  view.cursor = cursor()
  if (!state.drawing) {
    begin(view.cursor)
    announce(isScribble() ? "Begun; Enter adds a point, Shift and Enter ends" : "Corner set; move, then Enter again")
  } else if (isScribble()) {
    extend(view.cursor)
    if (ends) finish()
  } else {
    finish()
  }
}

// `onShape` takes {kind, points} that the user has drawn.
export function startGestures(onShape) {
  use = onShape
  canvas.tabIndex = 0
  canvas.setAttribute("role", "application")
  canvas.onfocus = canvas.onblur = () => { if (aim()) { view.cursor ??= cursor(); redraw() } }
  on("shown task examples", () => { state.drawing = null })
  find("tools").onchange = event => {
    state.tool = event.target.value
    changed("region")
  }
}
