// A colour for each phrase, as `lumen_ray.viz.palette` chooses them.

const HUES = { red: 0, orange: 0.08, yellow: 0.14, green: 0.36, cyan: 0.51, blue: 0.6, purple: 0.76, pink: 0.92 }
const SHADES = [[0.85, 0.93], [0.95, 0.66], [0.6, 1], [0.75, 0.8]] // saturation and value

// phrase -> {rgb, css, ink}; `ink` is black or white, whichever reads better on it.
export function palette(phrases) {
  const colours = new Map(), used = new Map()
  for (const phrase of new Set(phrases)) {
    const words = phrase.toLowerCase().split(/\s+/).filter(word => word in HUES)
    const named = words.length === 1 ? HUES[words[0]] : null
    const nth = used.get(named) || 0
    used.set(named, nth + 1)
    const hue = named === null ? (0.55 + nth * 0.381966) % 1 : (named + 0.015 * nth) % 1
    const shade = SHADES[(named === null ? nth % 2 : nth) % SHADES.length]
    const rgb = fromHsv(hue, ...shade)
    colours.set(phrase, { rgb, css: `rgb(${rgb.join(" ")})`, ink: inkOn(rgb) })
  }
  return colours
}

function fromHsv(hue, saturation, value) {
  return [5, 3, 1].map(n => {
    const k = (n + hue * 6) % 6
    return Math.round(255 * value * (1 - saturation * Math.max(0, Math.min(k, 4 - k, 1))))
  })
}

function inkOn([red, green, blue]) { return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#111" : "#fff" }
