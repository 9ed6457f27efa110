// What the page knows, and who is called when it changes.

export const state = {
  model: null, // what /v1/models says of the model
  tasks: new Map(), // name -> its entry of /v1/tasks
  task: null, // the entry that is chosen
  picture: null, // the image that is asked about
  views: [], // further images to look at: {picture, label}, those of examples and those that were made
  shown: null, // the picture on the stage
  region: null, // {kind, points} on the image that is asked about
  tool: "shape", // or "scribble"
  drawing: null, // {kind, points} while it is drawn
  classes: [], // classes by example: {name, named, examples: [{box, positive, picture}]}
  marking: null, // {entry, positive}: boxes that are drawn become examples of a class
  answer: null, // the last answer, {...as JSON, picture}
  request: null, // what was asked for it, {path, body}
  hover: -1, // number of the instance that is highlighted
  score: 0.3, // instances below are hidden
  hidden: new Set(), // phrases that are hidden
  layers: {
    picture: { label: "Image", on: true, opacity: 1 },
    masks: { label: "Masks", on: true, opacity: 1 },
    boxes: { label: "Boxes", on: true, opacity: 1 },
    keypoints: { label: "Keypoints", on: true, opacity: 1 },
    labels: { label: "Labels", on: true, opacity: 1 },
  },
}

const listeners = new Map()

// Calls `listener` after `changed` with one of the topics.
export function on(topics, listener) {
  for (const topic of topics.split(" ")) listeners.set(topic, [...(listeners.get(topic) || []), listener])
}

// Topics: model, task, picture (asked about), shown (on the stage), views, region, examples, classes, answer, filter
// (which of its instances are shown), look (how they are drawn), key (the server asks for one).
export function changed(...topics) {
  for (const listener of new Set(topics.flatMap(topic => listeners.get(topic) || []))) listener()
}

// Instances of the answer that are not hidden, each with its number `index` in the answer.
export function visible() {
  return (state.answer?.instances || [])
    .map((item, index) => ({ ...item, index }))
    .filter(item => item.score >= state.score && !state.hidden.has(item.phrase))
}

export function takes(field) { return Boolean(state.task?.fields.includes(field)) }
