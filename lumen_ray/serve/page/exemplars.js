// Classes by example: boxes on the image, or on others, around what is meant and what is not.
import { announce, find, make } from "./dom.js"
import { addView, show, thumbnail, FALLBACK_LIMITS } from "./open.js"
import { openPicture } from "./picture.js"
import { changed, on, state, takes } from "./state.js"

const MOST_EXAMPLES = 8 // of one class, as in `lumen_ray.exemplars`
let uploadFor = null // the class that an example image is chosen for

// Whether the chosen task takes classes by example, and the model was trained with them.
export const isOffered = () => takes("classes") && state.task.result !== "keypoints" && state.model?.exemplars !== false

// The classes with a positive example, as in a request; the image of an example is left out if it is the request's.
export function exampleClasses() {
  if (!isOffered()) return []
  return state.classes.filter(isComplete).map(({ name, named, examples }) => ({
    name: name.trim(),
    ...(named ? {} : { named }),
    examples: examples.map(({ box, positive, picture }) => ({
      box, ...(positive ? {} : { positive }), ...(picture === state.picture ? {} : { image: picture }),
    })),
  }))
}

export const isComplete = ({ name, examples }) => Boolean(name.trim()) && examples.some(example => example.positive)

// Takes a shape that was drawn.
export function addExample({ kind, points }) {
  if (kind !== "box") { announce("Drag a box around the object"); return }
  const { entry, positive } = state.marking
  entry.examples.push({ box: points.flat(), positive, picture: state.shown })
  if (entry.examples.length >= MOST_EXAMPLES) state.marking = null
  announce(positive ? "Example added" : "Counterexample added")
  changed("examples")
}

function setMarking(entry, positive) {
  const isOn = state.marking?.entry === entry && state.marking.positive === positive
  state.marking = isOn ? null : { entry, positive }
  if (!isOn && !state.shown && state.picture) show(state.picture)
  changed("examples")
  if (!isOn) find("view").focus({ preventScroll: true })
}

function toggle(entry, positive, words) {
  const isOn = state.marking?.entry === entry && state.marking.positive === positive
  const isFull = entry.examples.length >= MOST_EXAMPLES
  const button = make("button", { type: "button", disabled: !state.shown || isFull, className: "toggle" }, words)
  button.dataset.focus = `${entry.id}-${positive}`
  button.setAttribute("aria-pressed", isOn)
  button.onclick = () => setMarking(entry, positive)
  return button
}

function exampleItem(entry, example, number) {
  const { picture, box, positive } = example
  const what = `${positive ? "example" : "counterexample"} ${number + 1}`
  const remove = make("button", { type: "button" }, "×")
  remove.setAttribute("aria-label", `Remove ${what} of ${entry.name || "the class"}`)
  remove.onclick = () => {
    entry.examples = entry.examples.filter(other => other !== example)
    changed("examples")
    find("add-class").focus()
  }
  const sign = make("span", { className: positive ? "sign" : "sign not", ariaHidden: "true" }, positive ? "+" : "−")
  return make("li", {}, thumbnail(picture, box, 26), sign, remove)
}

function card(entry, number) {
  const name = make("input", { type: "text", id: `class-${entry.id}`, value: entry.name, autocomplete: "off" })
  name.oninput = () => { entry.name = name.value; changed("classes") }
  const read = make("input", { type: "checkbox", checked: entry.named })
  read.onchange = () => { entry.named = read.checked; changed("classes") }
  const upload = make("button", { type: "button" }, "Example image")
  upload.onclick = () => { uploadFor = entry; find("example-file").click() }
  const remove = make("button", { type: "button" }, "Remove class")
  remove.onclick = () => {
    state.classes = state.classes.filter(other => other !== entry)
    if (state.marking?.entry === entry) state.marking = null
    changed("examples")
    find("add-class").focus()
  }
  const list = make("ul", { className: "examples" }, ...entry.examples.map((e, n) => exampleItem(entry, e, n)))
  list.hidden = !entry.examples.length
  const group = make("div", { className: "by-example" },
    make("label", { htmlFor: name.id }, "Name in the answer"), name,
    make("label", { className: "check" }, read, "The model reads the name too"),
    make("div", { className: "row" },
      toggle(entry, true, "+ Box what is meant"), toggle(entry, false, "− Box what is not")),
    list,
    make("div", { className: "row" }, upload, remove))
  group.setAttribute("role", "group")
  group.setAttribute("aria-label", `Class by example ${number + 1}`)
  return group
}

function arrange() {
  find("examples-row").hidden = !isOffered()
  if (!isOffered()) state.marking = null
  const focus = document.activeElement?.dataset?.focus
  find("examples").replaceChildren(...state.classes.map(card))
  if (focus) find("examples").querySelector(`[data-focus="${focus}"]`)?.focus()
}

async function openExample(file) {
  try {
    const picture = await openPicture(file, state.model?.limits || FALLBACK_LIMITS)
    state.marking = { entry: uploadFor, positive: true }
    addView(picture, "Example", true)
    changed("examples")
  } catch (error) {
    find("missing").textContent = error.message
  }
}

export function startExemplars() {
  let id = 0
  find("add-class").onclick = () => {
    const entry = { id: ++id, name: "", named: false, examples: [] }
    state.classes.push(entry)
    state.marking = state.shown ? { entry, positive: true } : null
    changed("examples")
    find(`class-${entry.id}`).focus()
  }
  find("example-file").onchange = () => {
    if (find("example-file").files[0]) openExample(find("example-file").files[0])
    find("example-file").value = ""
  }
  on("examples task model shown", arrange)
}
