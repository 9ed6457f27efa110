// What the loaded model knows.
import { find, make, plural } from "./dom.js"
import { on, state } from "./state.js"

function fact(name, ...words) { return [make("dt", {}, name), make("dd", {}, ...words)] }

function facts() {
  const { model } = state, skeletons = Object.entries(model.skeletons || {})
  const tasks = [...state.tasks.keys()].map(name => name.replace("_", " ")).join(", ")
  const classes = model.classes?.length ? `${model.classes.length}: ${model.classes.join(", ")}` : "none by name"
  const shared = skeletons.every(([, points]) => points.join() === skeletons[0][1].join())
  const poses = shared && skeletons.length > 1
    ? `${skeletons.map(([name]) => name).join(", ")}: ${skeletons[0][1].join(", ")}`
    : skeletons.map(([name, points]) => `${name}: ${points.join(", ")}`).join("; ")
  return [
    ...fact("Model", `${model.preset}, version ${model.version}`),
    ...fact("Tasks", tasks),
    ...fact("Classes it was trained with", classes),
    ...(poses ? fact("Keypoints", poses) : []),
    ...fact("Classes by example", model.exemplars ? "yes" : "no"),
    ...fact("Image size it works at", `${model.image_size} pixels`),
    ...fact("Largest image", `${(model.limits.max_pixels / 1e6).toFixed(0)} million pixels; larger ones are scaled here`),
  ]
}

export function startAbout() {
  on("model", () => {
    find("model").textContent = `${state.model.preset}, version ${state.model.version}`
    const classes = state.model.classes?.length
    const counts = [...(classes ? [plural(classes, "class", "classes")] : []), plural(state.tasks.size, "task")]
    find("about-summary").textContent = `What this model knows: ${counts.join(", ")}`
    find("facts").replaceChildren(...facts())
    find("side").hidden = false
  })
}
