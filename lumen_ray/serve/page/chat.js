// A conversation about the image, streamed from /v1/chat/completions.
import { Sent, stream } from "./api.js"
import { palette } from "./colours.js"
import { announce, find, make, plural } from "./dom.js"
import { show, showMade } from "./open.js"
import { revealStage } from "./stage.js"
import { changed, on, state } from "./state.js"

const PATH = "v1/chat/completions"
let turns = [] // {question, text, answer, error, isStopped, isDone, request, node}
let running = null // the AbortController of the answer that is written

// Turns without an answer in text cannot be sent back: every message needs one.
const remembered = () => turns.filter(turn => turn.isDone && turn.text.trim())

function body(question) {
  const asked = [...remembered().flatMap(turn => [turn.question, turn.text]), question]
  const messages = asked.map((content, n) => ({ role: n % 2 ? "assistant" : "user", content }))
  if (state.picture && find("with-image").checked) {
    const image = { type: "image_url", image_url: { url: new Sent(state.picture, true) } }
    messages[0].content = [{ type: "text", text: messages[0].content }, image]
  }
  const system = find("system").value.trim()
  if (system) messages.unshift({ role: "system", content: system })
  const most = find("chat-tokens").valueAsNumber
  return { messages, ...(most >= 1 ? { max_completion_tokens: most } : {}) }
}

async function send(question) {
  const asked = body(question), request = { path: PATH, body: asked }
  const picture = find("with-image").checked ? state.picture : null
  const control = (running = new AbortController())
  const turn = { question, text: "", answer: null, error: "", isStopped: false, isDone: false, request }
  turns.push(turn)
  write(turn)
  arrange()
  announce("Asking")
  try {
    for await (const piece of stream(PATH, { ...asked, stream: true }, control.signal)) {
      turn.text += piece.choices[0]?.delta.content || ""
      if (piece.lumen) turn.answer = { ...piece.lumen, picture }
      write(turn)
    }
  } catch (error) {
    turn.isStopped = control.signal.aborted
    turn.error = turn.isStopped ? "" : error.message
    if (turn.error && !find("question").value) find("question").value = question // to be sent again
  }
  if (running === control) running = null
  turn.isDone = !turn.error
  if (!turns.includes(turn)) return // a new conversation has begun
  write(turn)
  arrange()
  announce(turn.error || turn.text || found(turn))
  if (turn.answer && picture === (find("with-image").checked ? state.picture : null)) {
    await present(turn)
  }
}

// Draws what an answer located; an answer in text alone leaves the image as it is.
async function present({ answer, request }) {
  Object.assign(state, { answer, request, hover: -1 })
  state.hidden.clear()
  changed("answer")
  await showMade(answer.images)
  if (!answer.images && answer.picture) show(answer.picture)
}

const found = turn => {
  const { instances, images } = turn.answer || {}
  if (images) return `${plural(images.length, "picture")} made.`
  return instances ? (instances.length ? `${instances.length} found.` : "Nothing found.") : ""
}

// The text of an answer, with the phrases whose objects it located in their colours.
function content(turn) {
  const { answer } = turn
  if (!answer?.parts) return [turn.text]
  const colours = palette(answer.phrases || [])
  return answer.parts.map(part => {
    if (part.type === "text") return part.text
    const mark = make("span", { className: "part" }, `${part.instances.length}`)
    mark.style.background = colours.get(part.phrase)?.css
    mark.style.color = colours.get(part.phrase)?.ink
    mark.title = `${part.phrase}: ${part.instances.length} found`
    return mark
  })
}

function write(turn) {
  turn.node ??= find("turns").appendChild(make("li"))
  const answer = make("div", { className: "said" })
  answer.append(make("span", { className: "unseen" }, "Answer: "), ...content(turn))
  const note = turn.error || (turn.isStopped ? "Stopped." : "")
  if (!turn.text && !note) answer.append(turn.isDone ? found(turn) || "The answer is empty." : "…")
  if (note) answer.append(make("p", { className: turn.error ? "error" : "soft" }, note))
  if (turn.answer?.instances?.length && turn.answer.picture) {
    const button = make("button", { type: "button" }, `Show ${plural(turn.answer.instances.length, "object")}`)
    button.onclick = () => { present(turn); revealStage() }
    answer.append(make("div", { className: "row" }, button))
  }
  const question = make("div", { className: "asked" }, make("span", { className: "unseen" }, "You: "), turn.question)
  turn.node.replaceChildren(question, answer)
  find("turns").scrollTop = find("turns").scrollHeight
}

function arrange() {
  // a button that hides would take the focus with it
  if (document.activeElement === find(running ? "send" : "stop")) find("question").focus()
  find("turns").hidden = !turns.length
  find("new-chat").hidden = !turns.length
  find("stop").hidden = !running
  find("send").hidden = Boolean(running)
  find("with-image").disabled = !state.picture || remembered().length > 0
}

function restart() {
  running?.abort()
  running = null
  turns = []
  find("turns").replaceChildren()
  arrange()
}

export function startChat() {
  find("chat-form").onsubmit = event => {
    event.preventDefault()
    const question = find("question").value.trim()
    if (!question || running || !find("chat-form").reportValidity()) return
    find("question").value = ""
    send(question)
  }
  find("question").onkeydown = event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
    event.preventDefault()
    find("chat-form").requestSubmit()
  }
  find("stop").onclick = () => { running?.abort(); find("question").focus() }
  find("new-chat").onclick = () => { restart(); announce("New conversation"); find("question").focus() }
  on("picture", restart) // a conversation is about one image
  arrange()
}
