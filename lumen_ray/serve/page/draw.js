// Draws an answer over its image, on the stage and for download.
import { palette } from "./colours.js"
import { maskCanvas } from "./masks.js"

export const KEYPOINT_SCORE = 0.3 // as in `lumen_ray.viz`
const SHARP = 3 // from this scale on pixels are seen as such
const CROWDED = 25 // more instances than this have labels only where their boxes are as wide

// `at`: {x, y, scale, unit}: an image point p is drawn at p * scale + (x, y), lines are `unit` thick.
// `look`: {layers, hover, model, phrases}; `instances`: those that are shown, each with its `index`.
export function drawAnswer(context, instances, at, look) {
  const colours = palette(look.phrases)
  const isCrowded = instances.length > CROWDED
  const layers = { masks: drawMask, boxes: drawBox, keypoints: drawKeypoints, labels: drawLabel }
  for (const [layer, draw] of Object.entries(layers)) {
    const { on, opacity } = look.layers[layer]
    if (!on) continue
    for (const item of instances) {
      const isOther = look.hover >= 0 && look.hover !== item.index
      context.globalAlpha = opacity * (isOther ? 0.2 : 1)
      const isHovered = look.hover === item.index, colour = colours.get(item.phrase)
      draw(context, item, at, { ...look, isCrowded, isHovered, colour })
    }
  }
  context.globalAlpha = 1
}

export function drawImage(context, bitmap, at, opacity) {
  context.globalAlpha = opacity
  context.imageSmoothingEnabled = at.scale < SHARP
  context.imageSmoothingQuality = "high"
  context.drawImage(bitmap, at.x, at.y, bitmap.width * at.scale, bitmap.height * at.scale)
  context.globalAlpha = 1
}

const place = (at, [x, y]) => [x * at.scale + at.x, y * at.scale + at.y]

// A line that is seen on any ground: twice, the wider one dark.
function outline(context, at, colour, width, trace) {
  for (const [style, thick] of [["#0007", width + 2], [colour, width]]) {
    context.strokeStyle = style
    context.lineWidth = thick * at.unit
    context.lineJoin = context.lineCap = "round"
    context.beginPath()
    trace()
    context.stroke()
  }
}

function drawMask(context, item, at, { colour }) {
  const made = item.mask && maskCanvas(item.mask, colour)
  if (!made) return
  context.imageSmoothingEnabled = at.scale < SHARP
  context.drawImage(made.canvas, ...place(at, [made.x, made.y]), made.width * at.scale, made.height * at.scale)
}

function drawBox(context, item, at, { colour, isHovered }) {
  const [x1, y1] = place(at, item.box), [x2, y2] = place(at, item.box.slice(2))
  outline(context, at, colour.css, isHovered ? 3 : 2, () => context.rect(x1, y1, x2 - x1, y2 - y1))
}

function drawKeypoints(context, item, at, { colour, model, isHovered }) {
  if (!item.keypoints) return
  const names = model.skeletons?.[item.phrase] || [], isSeen = name => item.keypoints[name]?.[2] >= KEYPOINT_SCORE
  for (const edge of model.edges?.[item.phrase] || []) {
    const ends = edge.map(number => names[number])
    if (!ends.every(isSeen)) continue
    const [from, to] = ends.map(name => place(at, item.keypoints[name]))
    outline(context, at, colour.css, 3, () => { context.moveTo(...from); context.lineTo(...to) })
  }
  for (const name of Object.keys(item.keypoints).filter(isSeen)) {
    const [x, y] = place(at, item.keypoints[name])
    outline(context, at, "#fff", 1.5, () => context.arc(x, y, 4.5 * at.unit, 0, 7))
    context.fillStyle = colour.css
    context.fill()
    if (isHovered) tag(context, name, x + 8 * at.unit, y - 9 * at.unit, at, "#000b", "#fff")
  }
}

function drawLabel(context, item, at, { colour, isCrowded, isHovered }) {
  const [x1, y1] = place(at, item.box), width = (item.box[2] - item.box[0]) * at.scale, high = 18 * at.unit
  const words = `${item.phrase} ${item.score.toFixed(2)}`
  context.font = `600 ${12 * at.unit}px system-ui, sans-serif`
  if (isCrowded && !isHovered && context.measureText(words).width > width) return
  tag(context, words, x1 - at.unit, y1 > high ? y1 - high : y1, at, colour.css, colour.ink)
}

function tag(context, words, x, y, at, fill, ink) {
  context.font = `600 ${12 * at.unit}px system-ui, sans-serif`
  const width = context.measureText(words).width + 10 * at.unit
  const left = Math.max(0, Math.min(x, context.canvas.width / (at.ratio || 1) - width))
  context.fillStyle = fill
  context.fillRect(left, y, width, 18 * at.unit)
  context.fillStyle = ink
  context.fillText(words, left + 5 * at.unit, y + 13 * at.unit)
}

// A region or box of the user's, `dashed` for what is not meant.
export function drawShape(context, { kind, points }, at, colour, dashed = false) {
  const placed = points.map(point => place(at, point))
  context.setLineDash(dashed ? [6, 5] : [])
  outline(context, at, colour, 2, () => {
    if (kind === "point") context.arc(...placed[0], 7, 0, 7)
    else if (kind === "box") context.rect(...placed[0], placed[1][0] - placed[0][0], placed[1][1] - placed[0][1])
    else placed.forEach(point => context.lineTo(...point))
  })
  context.setLineDash([])
}

export function drawCursor(context, point, at) {
  const [x, y] = place(at, point)
  outline(context, at, "#fff", 1.5, () => {
    context.moveTo(x - 12, y); context.lineTo(x + 12, y)
    context.moveTo(x, y - 12); context.lineTo(x, y + 12)
  })
}
