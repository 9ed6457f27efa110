// The answer in words and as a list; errors.
import { palette } from "./colours.js"
import { announce, find, make, plural } from "./dom.js"
import { highlight } from "./stage.js"
import { changed, on, state, visible } from "./state.js"

export function report(message) {
  Object.assign(state, { answer: null, hover: -1 })
  changed("answer")
  find("result").hidden = false
  find("error").hidden = false
  find("error").textContent = message
}

// A class by its name that is none of the model's, if it has some.
function isNew(phrase) {
  const known = state.model.classes || []
  return known.length > 0 && !known.includes(phrase) && Boolean(state.request?.body.classes?.includes(phrase))
}

function words() {
  const { answer } = state, shown = visible()
  if (answer.images) return `${plural(answer.images.length, "picture")} made.`
  if (answer.text !== undefined && answer.instances === undefined) return answer.text || "The answer is empty."
  if (answer.task === "count") {
    return answer.phrases.map(phrase => `${phrase}: ${shown.filter(item => item.phrase === phrase).length}`).join(", ")
  }
  const isFound = phrase => answer.instances.some(item => item.phrase === phrase)
  const unknown = (answer.phrases || []).filter(phrase => !isFound(phrase) && isNew(phrase))
  const hint = unknown.length ? ` This model was not trained with ${unknown.join(", ")}.` : ""
  const below = answer.instances.filter(item => item.score < state.score).length
  const count = shown.length ? `${shown.length} found` : "Nothing found"
  return `${count}${below ? `, ${below} below the score` : ""}.${hint}`
}

function item(instance, colour) {
  const button = make("button", { type: "button", className: "found" }, instance.score.toFixed(2))
  button.setAttribute("aria-label", `${instance.phrase}, score ${instance.score.toFixed(2)}, at `
    + instance.box.map(Math.round).join(", "))
  button.dataset.index = instance.index
  button.style.borderColor = colour.css
  button.onmouseenter = button.onfocus = () => highlight(instance.index)
  button.onmouseleave = button.onblur = () => highlight(-1)
  return make("li", {}, button)
}

// A phrase with its objects, which a checkbox hides.
function group(phrase, colour) {
  const found = state.answer.instances
    .map((instance, index) => ({ ...instance, index }))
    .filter(instance => instance.phrase === phrase && instance.score >= state.score)
  const box = make("input", { type: "checkbox", checked: !state.hidden.has(phrase) })
  box.dataset.phrase = phrase
  box.onchange = () => {
    if (box.checked) state.hidden.delete(phrase)
    else state.hidden.add(phrase)
    changed("filter")
  }
  const swatch = make("i", { className: "swatch" })
  swatch.style.background = colour.css
  const label = make("label", { className: "check" }, box, swatch, make("span", { className: "phrase" }, phrase),
    make("span", { className: "soft" }, `${found.length}`))
  return make("div", { className: "group" }, label, make("ul", {}, ...found.map(instance => item(instance, colour))))
}

function list() {
  const { answer } = state, focused = document.activeElement?.dataset?.phrase
  find("said").textContent = answer.task === "chat" && !answer.instances?.length ? "" : words()
  const colours = palette(answer.phrases || [])
  const groups = answer.instances ? [...colours].map(([phrase, colour]) => group(phrase, colour)) : []
  find("list").replaceChildren(...groups)
  if (focused) [...find("list").querySelectorAll("input")].find(box => box.dataset.phrase === focused)?.focus()
}

function arrange() {
  const { answer } = state
  find("result").hidden = !answer
  find("error").hidden = true
  find("found").hidden = !answer
  if (!answer) return
  const hasInstances = Boolean(answer.instances?.length)
  find("score-row").hidden = !hasInstances
  find("save-coco").hidden = !hasInstances
  find("save-png").hidden = !hasInstances && !answer.images
  find("use-made").hidden = !answer.images
  find("save-image").hidden = !answer.picture?.differs
  const { timing_ms: timing, route } = answer
  find("timing").textContent = `${timing ? `${timing.total} ms` : ""}${route ? `, routed by ${route}` : ""}`
  const { picture, ...raw } = answer
  find("raw").textContent = find("json").open ? JSON.stringify(raw, null, 1) : ""
  list()
  announce(find("said").textContent)
}

function mark() {
  for (const button of find("list").querySelectorAll(".found")) {
    button.classList.toggle("on", Number(button.dataset.index) === state.hover)
  }
}

export function startResult() {
  find("score").oninput = () => { state.score = Number(find("score").value); changed("filter") }
  find("json").ontoggle = arrange
  on("answer", arrange)
  on("filter", () => {
    find("score-value").textContent = state.score.toFixed(2)
    if (state.answer) list()
  })
  on("look", mark)
  find("score-value").textContent = state.score.toFixed(2)
}
