'use strict'
// The data of the gallery: scripts beside this one call `gallery.meta`, `gallery.index` and `gallery.chunk`.
const gallery = (() => {
  const CACHED_CHUNKS = 128 // more than a page needs if each of its images is in a chunk of its own
  const index = []
  const chunks = new Map() // number -> what was found in its images, the one used last at the end
  const waiting = new Map() // number of a chunk -> {promise, resolve}
  const pad = (number, digits) => String(number).padStart(digits, '0')
  let meta
  let whenIndexed

  function load(file) {
    return new Promise((resolve, reject) => {
      const script = document.createElement('script')
      script.src = `gallery/${file}`
      script.onload = () => { script.remove(); resolve() }
      script.onerror = () => { script.remove(); reject(new Error(`gallery/${file} is missing`)) }
      document.head.append(script)
    })
  }

  function bytes(code) {
    const text = atob(code)
    const found = new Uint8Array(text.length)
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i)
    return found
  }

  async function loadIndex() {
    const parts = Math.ceil(meta.images / meta.indexImages)
    for (let part = 0; part < parts; part++) await load(`index/${pad(part, 5)}.js`)
  }

  // The images that `filter` leaves, as numbers in its order.
  // filter: {task, classes (a Set of numbers), from, to (hundredths), state, order}
  function select(filter) {
    const tasks = meta.tasks.length
    const hasScores = !meta.tasks[filter.task].isText
    const isNarrow = hasScores && (filter.classes.size > 0 || filter.from > meta.scoreFrom || filter.to < 100)
    const found = new Uint32Array(meta.images)
    const keys = new Float64Array(meta.images)
    let selected = 0, image = 0
    for (const part of index) {
      let at = 0
      const number = () => {
        let value = 0, shift = 0, byte
        do { byte = part[at++]; value += (byte & 0x7f) * 2 ** shift; shift += 7 } while (byte & 0x80)
        return value
      }
      for (const end = Math.min(image + meta.indexImages, meta.images); image < end; image++) {
        const head = number()
        let count = 0, sum = 0, lowest = 101
        for (let groups = Math.floor(head / 2); groups > 0; groups--) {
          const key = number(), size = number()
          if (key < tasks) { // texts, which have no scores
            if (key === filter.task) count += size
            continue
          }
          const isWanted = key % tasks === filter.task
            && (!filter.classes.size || filter.classes.has(Math.floor(key / tasks) - 1))
          for (const last = at + size; at < last; at++) {
            const score = part[at]
            if (isWanted && score >= filter.from && score <= filter.to) {
              count++
              sum += score
              if (score < lowest) lowest = score
            }
          }
        }
        const failed = head % 2 === 1
        const isShown = filter.state === 'failed' ? failed
          : filter.state === 'empty' ? !failed && count === 0
            : filter.state === 'found' || isNarrow ? count > 0 : true
        if (!isShown) continue
        found[selected++] = image
        keys[image] = filter.order === 'crowded' ? -count
          : lowest > 100 ? 101 : filter.order === 'mean' ? sum / count : lowest
      }
    }
    if (filter.order !== 'input') return found.subarray(0, selected).sort((a, b) => keys[a] - keys[b] || a - b)
    const shown = found.subarray(0, selected)
    if (!meta.order.length) return shown
    const rank = new Map(meta.order.map((image, place) => [image, place]))
    return shown.sort((a, b) => rank.get(a) - rank.get(b))
  }

  function chunk(number) {
    if (chunks.has(number)) {
      const cards = chunks.get(number)
      chunks.delete(number)
      chunks.set(number, cards)
      return Promise.resolve(cards)
    }
    if (!waiting.has(number)) {
      const perFolder = meta.folder / meta.chunk
      const file = `${pad(Math.floor(number / perFolder), 5)}/${pad(number % perFolder, 2)}.js`
      waiting.set(number, load(file).then(() => chunks.get(number)).finally(() => waiting.delete(number)))
    }
    return waiting.get(number)
  }

  return {
    meta(given) {
      meta = given
      whenIndexed = loadIndex()
      start(meta)
    },
    index(part, code) { index[part] = bytes(code) },
    chunk(number, cards) {
      chunks.set(number, cards)
      for (const oldest of chunks.keys()) {
        if (chunks.size <= CACHED_CHUNKS) break
        chunks.delete(oldest)
      }
    },
    // What was found in an image: see `labelled_card` in cards.py.
    async card(image) { return (await chunk(Math.floor(image / meta.chunk)))[image % meta.chunk] },
    thumbnail: image => `gallery/${pad(Math.floor(image / meta.folder), 5)}/${pad(image % meta.folder, 4)}.jpg`,
    async select(filter) {
      await whenIndexed
      return select(filter)
    },
  }
})()
