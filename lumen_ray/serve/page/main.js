// The page: asks for model and tasks, and starts its parts.
import { startAbout } from "./about.js"
import { get, hasKey, setKey } from "./api.js"
import { startChat } from "./chat.js"
import { find } from "./dom.js"
import { startExemplars } from "./exemplars.js"
import { startForm, takeShape } from "./form.js"
import { startGestures } from "./gestures.js"
import { startLayers } from "./layers.js"
import { startOpening } from "./open.js"
import { startResult } from "./result.js"
import { startSaving } from "./save.js"
import { startStage } from "./stage.js"
import { changed, on, state } from "./state.js"

const RETRY_MS = 3000

async function connect() {
  try {
    const [{ tasks }, models] = await Promise.all([get("v1/tasks"), get("v1/models")])
    find("key-form").hidden = true
    state.model = models.data[0].lumen
    state.tasks = new Map(tasks.map(task => [task.name, task]))
    find("chat-tab").hidden = !state.tasks.has("chat")
    changed("model")
  } catch (error) {
    const needsKey = error.status === 401
    find("model").textContent = !needsKey ? "The model is not ready; trying again." : hasKey()
      ? "This API key is not valid." : "This server needs an API key."
    if (!needsKey) setTimeout(connect, RETRY_MS)
  }
}

// Tabs by arrow keys, as in the patterns of WAI-ARIA.
function startTabs() {
  const tabs = [...find("tabs").children], panel = tab => find(tab.getAttribute("aria-controls"))
  const choose = chosen => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen)
      tab.tabIndex = tab === chosen ? 0 : -1
      panel(tab).hidden = tab !== chosen
    }
    state.marking = null
    changed("examples", "region")
  }
  for (const tab of tabs) tab.onclick = () => choose(tab)
  find("tabs").onkeydown = event => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || tabs.some(tab => tab.hidden)) return
    const other = tabs.find(tab => tab.getAttribute("aria-selected") === "false")
    choose(other)
    other.focus()
  }
}

on("key", () => { find("key-form").hidden = false })
find("key-form").onsubmit = event => {
  event.preventDefault()
  setKey(find("key").value.trim())
  find("key").value = ""
  connect()
}
startAbout()
startStage()
startGestures(takeShape)
startExemplars()
startForm()
startResult()
startLayers()
startSaving()
startChat()
startTabs()
startOpening()
connect()
