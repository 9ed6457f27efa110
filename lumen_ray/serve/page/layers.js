// The layers of the stage: image, masks, boxes, keypoints and labels, each with a switch and an opacity.
import { find, make } from "./dom.js"
import { changed, on, state } from "./state.js"

const rows = {}

function row(layer) {
  const box = make("input", { type: "checkbox", checked: layer.on })
  const range = make("input", { type: "range", min: "0", max: "100", step: "5", value: `${100 * layer.opacity}` })
  range.setAttribute("aria-label", `Opacity of ${layer.label.toLowerCase()}, percent`)
  box.onchange = () => { layer.on = box.checked; range.disabled = !layer.on; changed("look") }
  range.oninput = () => { layer.opacity = Number(range.value) / 100; changed("look") }
  return make("div", { className: "layer" }, make("label", { className: "check" }, box, layer.label), range)
}

export function startLayers() {
  for (const [name, layer] of Object.entries(state.layers)) find("layers").append(rows[name] = row(layer))
  on("answer", () => {
    const found = state.answer?.instances || []
    find("layers").hidden = !found.length
    rows.masks.hidden = !found.some(item => item.mask)
    rows.keypoints.hidden = !found.some(item => item.keypoints)
  })
}
