// Downloads, and the request as code.
import { asCurl, asPython } from "./code.js"
import { announce, find, make } from "./dom.js"
import { drawAnswer, drawImage, KEYPOINT_SCORE } from "./draw.js"
import { maskArea } from "./masks.js"
import { look } from "./stage.js"
import { on, state, visible } from "./state.js"

const LABELLED_SIDE = 800
const thousandths = value => Math.round(1000 * value) / 1000

// The shown instances in COCO's format, with the fields that `lumen-ray label` writes.
export function coco() {
  const { answer } = state, { picture } = answer
  const names = [...new Set(answer.phrases)]
  const categories = names.map((name, n) => ({ id: n + 1, name, ...skeletonOf(name) }))
  const annotations = visible().map((item, n) => {
    const [x1, y1, x2, y2] = item.box, size = [x2 - x1, y2 - y1]
    return {
      id: n + 1, image_id: 1, category_id: names.indexOf(item.phrase) + 1,
      bbox: [x1, y1, ...size].map(thousandths), area: item.mask ? maskArea(item.mask) : thousandths(size[0] * size[1]),
      iscrowd: 0, score: item.score, ...(item.mask ? { segmentation: item.mask } : {}), ...keypointsOf(item),
    }
  })
  const images = [{ id: 1, file_name: picture.name, height: answer.height, width: answer.width }]
  return { info: { description: `lumen_ray, task ${answer.task}` }, images, categories, annotations }
}

function skeletonOf(name) {
  const keypoints = state.answer.instances.find(item => item.phrase === name && item.keypoints)?.keypoints
  if (!keypoints) return {}
  const names = Object.keys(keypoints), trained = state.model.skeletons?.[name] || []
  const edges = (state.model.edges?.[name] || []).map(edge => edge.map(number => names.indexOf(trained[number]) + 1))
  return { keypoints: names, skeleton: edges.filter(edge => edge.every(Boolean)) } // COCO counts from 1
}

function keypointsOf({ keypoints }) {
  if (!keypoints) return {}
  const points = Object.values(keypoints), isSeen = score => score >= KEYPOINT_SCORE
  return {
    keypoints: points.flatMap(([x, y, score]) => [x, y, isSeen(score) ? 2 : 0]),
    num_keypoints: points.filter(([, , score]) => isSeen(score)).length,
    keypoint_scores: points.map(([, , score]) => score),
  }
}

// The image at its full size, with what is drawn on it. Small ones are enlarged by a whole factor, for the labels.
async function drawnPng() {
  const { picture } = state.answer, side = Math.max(picture.width, picture.height)
  const scale = Math.max(1, Math.floor(LABELLED_SIDE / side)), unit = Math.max(1, side / 1000)
  const canvas = make("canvas", { width: picture.width * scale, height: picture.height * scale })
  const context = canvas.getContext("2d"), at = { x: 0, y: 0, scale, unit }
  const { on: isOn, opacity } = state.layers.picture
  if (isOn) drawImage(context, picture.bitmap, at, opacity)
  drawAnswer(context, visible(), at, look())
  const blob = await new Promise(resolve => canvas.toBlob(resolve, "image/png"))
  if (!blob) throw new Error("The image is too large for a picture of this browser.")
  return blob
}

function download(blob, name) {
  const url = URL.createObjectURL(blob)
  make("a", { href: url, download: name }).click()
  setTimeout(() => URL.revokeObjectURL(url), 60_000)
  announce(`${name} saved`)
}

const stem = () => (state.answer.picture?.name || "made").replace(/\.\w+$/, "")

async function savePng() {
  const { images } = state.answer
  if (!images) { download(await drawnPng(), `${stem()}-${state.answer.task}.png`); return }
  const made = state.views.filter(view => !view.isExample).map(view => view.picture)
  const picture = made.find(one => one === state.shown) || made[0]
  download(picture.blob, picture.name)
}

// The request with the score that the slider shows, which hides instances as the server's threshold does.
function shownRequest() {
  const { path, body } = state.request
  return { path, body: "score_threshold" in body ? { ...body, score_threshold: state.score } : body }
}

async function copy(text, words) {
  find("code-text").textContent = text
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text)
    else copyOld(text) // browsers give pages without TLS no clipboard
    announce(words)
  } catch {
    announce("The browser does not let this page copy; the text is below")
  }
}

function copyOld(text) {
  const area = make("textarea", { value: text, className: "unseen" })
  document.body.append(area)
  area.select()
  document.execCommand("copy")
  area.remove()
}

function arrangeCode() {
  find("code").hidden = !state.request
  if (state.request && find("code").open) find("code-text").textContent = asCurl(shownRequest())
}

export function startSaving() {
  find("save-coco").onclick = () => {
    const text = JSON.stringify(coco(), null, 1)
    download(new Blob([text], { type: "application/json" }), `${stem()}-${state.answer.task}.json`)
  }
  find("save-png").onclick = () => savePng().catch(error => announce(error.message))
  find("save-image").onclick = () => download(state.answer.picture.blob, state.answer.picture.name)
  find("copy-curl").onclick = () => copy(asCurl(shownRequest()), "curl command copied")
  find("copy-python").onclick = () => copy(asPython(shownRequest()), "Python program copied")
  find("code").ontoggle = arrangeCode
  on("answer filter", arrangeCode)
}
