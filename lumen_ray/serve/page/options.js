// Fields of requests that have a default, by their names in the API.
import { find, items, make } from "./dom.js"
import { state } from "./state.js"

const number = (label, min, max, step) => ({ label, min, max, step, read: Number })
const FIELDS = {
  max_per_phrase: number("Most objects of a class", 1, 1000, 1),
  max_new_tokens: number("Longest answer, tokens", 1, 1024, 1),
  temperature: number("Temperature", 0, 2, "any"),
  top_p: number("Top-p", 0, 1, "any"),
  top_k: number("Top-k", 0, 2 ** 31, 1),
  repetition_penalty: number("Repetition penalty", 0.01, 10, "any"),
  stop: { label: "Stop at, comma-separated", read: items },
  seed: number("Seed", 0, 2 ** 53 - 1, 1),
  steps: number("Denoising steps", 1, 200, 1),
  guidance: number("Guidance by the text", 0, 100, "any"),
  image_guidance: number("Guidance by the image", 0, 100, "any"),
  width: number("Width, pixels", 8, 4096, 8),
  height: number("Height, pixels", 8, 4096, 8),
  num_images: number("Pictures", 1, 16, 1),
}

// Those that a task takes: every task has the limits of its answer.
function namesOf(task) {
  const limit = task.result === "text" ? ["max_new_tokens"] : task.result === "image" ? [] : ["max_per_phrase"]
  return [...limit, ...Object.keys(FIELDS).filter(name => task.fields.includes(name))]
}

// Shows the fields of the chosen task. What was written for another task is kept where both have the field.
export function arrangeOptions() {
  const before = given()
  find("options").replaceChildren(...namesOf(state.task).map(name => {
    const { label, read, ...range } = FIELDS[name]
    const type = read === Number ? "number" : "text"
    const input = make("input", { type, id: `option-${name}`, name, autocomplete: "off", ...range })
    input.placeholder = "default"
    if (before[name] !== undefined) input.value = before[name]
    return make("div", {}, make("label", { htmlFor: input.id }, label), input)
  }))
}

function given() {
  const inputs = [...find("options").querySelectorAll("input")].filter(input => input.value.trim())
  return Object.fromEntries(inputs.map(input => [input.name, input.value]))
}

// name -> value of the fields that are filled in.
export function options() {
  return Object.fromEntries(Object.entries(given()).map(([name, value]) => [name, FIELDS[name].read(value)]))
}
