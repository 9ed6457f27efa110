'use strict'
// Draws instances on a canvas over a picture, as `lumen_ray.viz` does.
const drawing = (() => {
  const MASK_ALPHA = 0.35
  const CROWDED = 10 // more instances than this have smaller labels, and names only where the box is as wide
  const SMALL = 420 // CSS pixels, of the cards
  const MAX_LABELLED = 40 // the labels of more would hide the picture
  const [CLASS, SCORE, X1, Y1, X2, Y2, MASK, KEYPOINTS] = [0, 1, 2, 3, 4, 5, 6, 7]

  const rgb = colour => [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16))

  // Black or white, whichever reads better on a colour.
  function ink(colour) {
    const [red, green, blue] = rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 150 ? '#0f0f0f' : '#fff'
  }

  // A COCO run-length string as bytes, 1 inside, column by column.
  function decodeMask(counts, size) {
    const mask = new Uint8Array(size)
    const lengths = []
    for (let at = 0, start = 0, inside = 0; at < counts.length; inside = 1 - inside) {
      let length = 0, shift = 0, code
      do {
        code = counts.charCodeAt(at++) - 48
        length |= (code & 0x1f) << shift
        shift += 5
      } while (code & 0x20)
      if (code & 0x10 && shift < 32) length |= -1 << shift
      if (lengths.length > 2) length += lengths[lengths.length - 2]
      lengths.push(length)
      if (inside) mask.fill(1, start, start + length)
      start += length
    }
    return mask
  }

  function masks(context, instances, [height, width], colours, [right, bottom]) {
    const data = new ImageData(width, height)
    for (const instance of instances) {
      const mask = decodeMask(instance[MASK], width * height)
      const colour = rgb(colours[instance[CLASS]])
      for (let x = 0; x < width; x++) {
        for (let y = 0; y < height; y++) {
          const at = x * height + y
          if (!mask[at]) continue
          const isEdge = !(x && y && x < width - 1 && y < height - 1
            && mask[at - 1] && mask[at + 1] && mask[at - height] && mask[at + height])
          const place = 4 * (y * width + x)
          const below = isEdge ? 0 : data.data[place + 3] / 255 // of masks drawn before
          const alpha = isEdge ? 1 : MASK_ALPHA + below * (1 - MASK_ALPHA)
          for (let channel = 0; channel < 3; channel++) {
            const value = isEdge ? 0.7 * colour[channel] : colour[channel]
            const share = isEdge ? 1 : MASK_ALPHA / alpha
            data.data[place + channel] = value * share + data.data[place + channel] * (1 - share)
          }
          data.data[place + 3] = 255 * alpha
        }
      }
    }
    const canvas = Object.assign(document.createElement('canvas'), { width, height })
    canvas.getContext('2d').putImageData(data, 0, 0)
    context.drawImage(canvas, 0, 0, right, bottom)
  }

  function keypoints(context, flat, edges, colour, scale, limit, width) {
    const points = []
    for (let k = 0; k < flat.length; k += 3) points.push([flat[k] * scale, flat[k + 1] * scale, flat[k + 2] >= limit])
    for (const [a, b] of edges) {
      if (!points[a]?.[2] || !points[b]?.[2]) continue
      for (const [stroke, lineWidth] of [['#fff', width + 2], [colour, width]]) {
        Object.assign(context, { strokeStyle: stroke, lineWidth })
        context.beginPath()
        context.moveTo(points[a][0], points[a][1])
        context.lineTo(points[b][0], points[b][1])
        context.stroke()
      }
    }
    for (const [x, y, isShown] of points) {
      if (!isShown) continue
      Object.assign(context, { fillStyle: colour, strokeStyle: '#fff', lineWidth: 1 })
      context.beginPath()
      context.arc(x, y, 1.5 * width, 0, 2 * Math.PI)
      context.fill()
      context.stroke()
    }
  }

  // Name and score on a tag above the box, inside it or below it, where no other tag is; in a small picture, one that
  // would cover another is left out.
  function label(context, instance, name, colour, scale, taken, [right, bottom], height) {
    const score = (instance[SCORE] / 1000).toFixed(2)
    const wide = `${name} ${score}`
    const [x1, y1, x2, y2] = [X1, Y1, X2, Y2].map(at => instance[at] * scale)
    const text = taken.isCrowded && taken.length && context.measureText(wide).width > x2 - x1 ? score : wide
    const width = context.measureText(text).width + 6
    const x = Math.min(Math.max(0, x1), Math.max(0, right - width))
    const places = [y1 - height, y1, y2, y2 - height].map(y => Math.min(Math.max(0, y), Math.max(0, bottom - height)))
    const isFree = y => !taken.some(t => x < t[0] + t[2] && t[0] < x + width && y < t[1] + height && t[1] < y + height)
    const y = places.find(isFree) ?? (taken.isSmall ? undefined : places[0])
    if (y === undefined) return
    taken.push([x, y, width])
    context.fillStyle = colour
    context.fillRect(x, y, width, height)
    context.fillStyle = ink(colour)
    context.fillText(text, x + 3, y + height / 2 + 0.5)
  }

  // Draws `instances` of a card into a canvas of `size`, [width, height] in CSS pixels.
  // meta: {classes, colours, keypointScore}; edges: class -> pairs of keypoints
  function draw(canvas, size, card, instances, meta, edges) {
    const ratio = Math.min(devicePixelRatio || 1, 2)
    canvas.width = Math.round(size[0] * ratio)
    canvas.height = Math.round(size[1] * ratio)
    const context = canvas.getContext('2d')
    context.scale(ratio, ratio)
    const scale = size[0] / card.s[0]
    const width = Math.max(2, Math.round(Math.max(...size) / 220))
    const masked = instances.filter(instance => instance[MASK])
    if (masked.length) masks(context, masked, card.m, meta.colours, size)
    for (const instance of instances) {
      const [x1, y1, x2, y2] = [X1, Y1, X2, Y2].map(at => instance[at] * scale)
      const [right, bottom] = [Math.min(x2, size[0]), Math.min(y2, size[1])]
      const [left, top] = [Math.max(x1, 0), Math.max(y1, 0)]
      // a dark hairline keeps the box visible on a background of the same colour
      for (const [stroke, lineWidth] of [['#141414', width + 2], [meta.colours[instance[CLASS]], width]]) {
        Object.assign(context, { strokeStyle: stroke, lineWidth })
        context.strokeRect(left + 1, top + 1, Math.max(right - left - 2, 1), Math.max(bottom - top - 2, 1))
      }
    }
    for (const instance of instances) {
      const colour = meta.colours[instance[CLASS]]
      const joined = edges?.[instance[CLASS]] ?? []
      if (instance[KEYPOINTS]) {
        keypoints(context, instance[KEYPOINTS], joined, colour, scale, meta.keypointScore, width)
      }
    }
    if (instances.length > MAX_LABELLED) return
    const isCrowded = instances.length > CROWDED
    const font = Math.max(isCrowded ? 10 : 11, Math.round(Math.max(...size) / (isCrowded ? 60 : 50)))
    Object.assign(context, { font: `${font}px system-ui, sans-serif`, textBaseline: 'middle' })
    const taken = Object.assign([], { isCrowded, isSmall: Math.max(...size) < SMALL })
    for (const instance of instances) {
      const [name, colour] = meta.classes[instance[CLASS]]
      label(context, instance, name, colour, scale, taken, size, font + 5)
    }
  }

  return { draw }
})()
