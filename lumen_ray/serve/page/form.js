// The form of a task: what it needs, and the request that it makes.
import { ask } from "./api.js"
import { announce, find, items, make, plural } from "./dom.js"
import { addExample, exampleClasses, isComplete, isOffered } from "./exemplars.js"
import { show, showMade } from "./open.js"
import { arrangeOptions, options } from "./options.js"
import { report } from "./result.js"
import { aim, revealStage } from "./stage.js"
import { changed, on, state, takes } from "./state.js"

const LEAST_SCORE = 0.05 // is asked for; the slider hides the rest without a new request
const MOST_CHIPS = 200
const MOVES = matchMedia("(pointer: coarse)").matches ? "Two fingers move the image." : "Shift-drag moves the image."
const TEXTS = {
  question: "Question", sentence: "Sentence; every phrase in it is found", expression: "Expression for one object",
  description: "What the picture should show", instruction: "What to change",
}
const HELP = {
  caption: "Describes the image.", vqa: "Answers a question about the image.",
  region_caption: "Describes what is at a place of the image.", detect: "Boxes around every object of some classes.",
  ground: "Boxes for every phrase of a sentence.", refer: "A box around the one object that an expression means.",
  segment: "Masks of every object of some classes.", region_segment: "A mask of what is at a place of the image.",
  semantic: "One mask for each class.", pose: "Keypoints of every object of some classes.",
  count: "Counts the objects of some classes.", generate: "Makes a picture from a text; no image is needed.",
  edit: "Makes the image anew with a change.",
}
let running = null // the AbortController of the request that is under way

// What the request still needs, in words; empty when it can be sent.
function missing() {
  const { task } = state
  if (!task) return "The model is not ready yet."
  if (task.sees_image && !state.picture) return "Open an image first."
  if (takes("region") && !state.region) return "Mark a place on the image."
  if (takes("text") && !find("text").value.trim()) return "Write the text above."
  if (!takes("classes")) return ""
  if (isOffered() && state.classes.some(entry => !isComplete(entry))) {
    return "A class by example needs a name and a box around what is meant."
  }
  return items(find("classes").value).length || exampleClasses().length ? "" : "Name a class."
}

function body() {
  const { task } = state, fields = task.sees_image ? { image: state.picture } : {}
  if (takes("classes")) fields.classes = [...items(find("classes").value), ...exampleClasses()]
  if (takes("text")) fields.text = find("text").value.trim()
  if (takes("keypoints") && items(find("keypoints").value).length) fields.keypoints = items(find("keypoints").value)
  if (takes("region")) fields.region = state.region
  if (["boxes", "masks", "keypoints", "count"].includes(task.result)) fields.score_threshold = LEAST_SCORE
  return { ...fields, ...options() }
}

async function submit() {
  if (missing() || !find("form").reportValidity()) return
  running?.abort()
  const control = (running = new AbortController())
  const request = { path: state.task.endpoint.slice(1), body: body() }, { picture } = state
  find("go").textContent = "Stop"
  announce("Asking")
  try {
    const answer = await ask(request.path, request.body, control.signal)
    if (running === control && picture === state.picture) await accept(answer, request)
  } catch (error) {
    if (error.name !== "AbortError") report(error.message)
  }
  if (running !== control) return
  running = null
  find("go").textContent = "Ask"
}

async function accept(answer, request) {
  Object.assign(state, { answer: { ...answer, picture: request.body.image || null }, request, hover: -1 })
  state.hidden.clear()
  changed("answer")
  await showMade(answer.images)
  if (!answer.images && state.picture) show(state.picture)
  if (answer.instances?.length || answer.images) revealStage()
}

// What is drawn on the stage: a region of the request, which is then sent, or an example.
export function takeShape(shape) {
  if (aim() === "example") { addExample(shape); return }
  state.region = shape
  changed("region")
  announce(`${shape.kind} marked`)
  submit()
}

function arrange() {
  const { task } = state
  if (!task) return
  for (const field of ["classes", "text", "keypoints"]) find(`${field}-row`).hidden = !takes(field)
  find("task-help").textContent = HELP[task.name] || ""
  find("text-label").textContent = TEXTS[task.needs] || "Text"
  find("options-row").hidden = !find("options").childElementCount
  const aims = aim(), hints = {
    region: state.tool === "scribble" ? "Draw on the image." : "Click the image for a point, drag for a box.",
    example: state.marking?.positive ? "Drag boxes around what is meant." : "Drag boxes around what is not meant.",
  }
  find("tools").hidden = aims !== "region"
  find("hint").hidden = !aims
  find("hint").textContent = aims ? `${hints[aims]} ${MOVES}` : ""
  check()
}

// What can be said without touching a field that the user is in.
function check() {
  const needed = missing()
  find("missing").textContent = needed
  find("missing").hidden = !needed
  find("go").setAttribute("aria-disabled", Boolean(needed))
  const chosen = items(find("classes").value)
  for (const chip of find("known-classes").querySelectorAll("button")) {
    chip.setAttribute("aria-pressed", chosen.includes(chip.textContent))
  }
}

function chooseTask() {
  state.task = state.tasks.get(find("task").value)
  Object.assign(state, { marking: null, answer: null, request: null })
  running?.abort()
  arrangeOptions()
  suggest()
  changed("task", "answer")
}

// Poses are of classes with a skeleton; other tasks begin with the first classes that the model knows.
function suggest() {
  const known = state.task.result === "keypoints" ? Object.keys(state.model.skeletons || {}) : state.model.classes || []
  const chosen = items(find("classes").value)
  if (!takes("classes") || chosen.some(name => known.includes(name))) return
  find("classes").value = known.slice(0, 3).join(", ")
}

function listClasses() {
  const known = state.model.classes || []
  find("known-classes").replaceChildren(...known.slice(0, MOST_CHIPS).map(name => {
    const chip = make("button", { type: "button" }, name)
    chip.onclick = () => {
      const chosen = items(find("classes").value)
      const others = chosen.filter(other => other !== name)
      find("classes").value = [...others, ...(chosen.includes(name) ? [] : [name])].join(", ")
      check()
    }
    return chip
  }))
  if (known.length > MOST_CHIPS) {
    find("known-classes").append(make("span", { className: "soft" }, `and ${plural(known.length - MOST_CHIPS, "other")}`))
  }
}

export function startForm() {
  find("form").onsubmit = event => {
    event.preventDefault()
    if (running) { running.abort(); announce("Stopped") }
    else if (missing()) announce(missing())
    else submit()
  }
  find("text").onkeydown = event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
    event.preventDefault()
    find("form").requestSubmit()
  }
  for (const id of ["classes", "text", "keypoints"]) find(id).oninput = check
  const open = () => { find("options-row").open = true } // so that the browser's reason is seen
  find("options").addEventListener("invalid", open, true)
  find("task").onchange = chooseTask
  on("task picture shown region examples", arrange)
  on("classes", check)
  on("picture", () => running?.abort())
  on("model", () => {
    const tasks = [...state.tasks.values()].filter(task => task.name !== "chat") // has a tab of its own
    find("task").replaceChildren(...tasks.map(({ name }) => new Option(name.replace("_", " "), name)))
    find("task-tab").hidden = !tasks.length
    if (!tasks.length) { find("chat-tab").click(); return }
    if (state.tasks.has("detect")) find("task").value = "detect"
    listClasses()
    chooseTask()
  })
}
