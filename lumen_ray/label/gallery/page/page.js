'use strict'
// The page of the gallery: filters, pages, cards, the large view and the keyboard.
const PAGE = 60
const ALL = { from: 0, to: 100, state: 'all', order: 'input' }
const find = id => document.getElementById(id)
const make = (tag, properties = {}, children = []) => {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

let meta
let filter // {task, classes, from, to, state, order}, as `gallery.select` takes it
let selected // numbers of the images that the filter leaves
let page = 0
let turn = 0 // counts the pages asked for: one that was overtaken is not shown
let cards = [] // of this page: {image, card, canvas, frame, item}
let current = 0 // the card that has the focus, or would get it
let opened = null // the card in the large view

const instancesOf = card => (card.t?.[filter.task] ?? []).filter(([phrase, score]) => {
  const hundredths = Math.floor(score / 10)
  return hundredths >= filter.from && hundredths <= filter.to && (!filter.classes.size || filter.classes.has(phrase))
})

function start(given) {
  meta = given
  meta.colours = meta.classes.map(([, colour]) => colour)
  ALL.from = meta.scoreFrom
  if (meta.order.length) find('order').options[0].text = 'as chosen'
  find('from').min = find('to').min = meta.scoreFrom
  find('box').open = innerWidth > 700
  readAddress()
  for (const [name, value] of Object.entries(meta.facts)) {
    find('facts').append(make('div', {}, [make('dt', { textContent: name }), make('dd', { textContent: value })]))
  }
  meta.tasks.forEach((task, number) => {
    const input = make('input', { type: 'radio', name: 'task', value: number })
    input.onchange = () => { filter.task = number; filter.classes.clear(); showControls(); update() }
    find('tasks').append(make('label', { className: 'chip' }, [input, make('span', { textContent: task.name })]))
  })
  find('tasks').hidden = meta.tasks.length < 2
  showControls()
  const isPlain = isWhole() && filter.order === 'input' && !meta.order.length
  if (isPlain) selected = { length: meta.images, slice: (a, b) => range(a, Math.min(b, meta.images)) }
  isPlain ? showPage() : update(page)
}

const range = (first, end) => Array.from({ length: Math.max(end - first, 0) }, (_, k) => first + k)
const isWhole = () => !filter.classes.size && ['from', 'to', 'state'].every(key => filter[key] === ALL[key])

// The filter is kept in the address, so that a view can be linked and found again.
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1))
  const task = meta.tasks.findIndex(({ name }) => name === given.get('task'))
  const boxed = meta.tasks.findIndex(({ isText }) => !isText)
  const names = new Map(meta.classes.map(([name], number) => [name, number]))
  const hundredths = (key) => Math.min(Math.max(Math.round(given.get(key) ?? ALL[key]) || 0, ALL.from), 100)
  const isChoice = key => [...find(key).options].some(({ value }) => value === given.get(key))
  const choice = key => isChoice(key) ? given.get(key) : ALL[key]
  filter = {
    task: task >= 0 ? task : Math.max(boxed, 0),
    classes: new Set(given.getAll('class').map(name => names.get(name)).filter(number => number !== undefined)),
    from: hundredths('from'), to: hundredths('to'), state: choice('state'), order: choice('order'),
  }
  page = Math.max(Math.round(given.get('page')) || 1, 1) - 1
}

function writeAddress() {
  const given = new URLSearchParams()
  if (page) given.set('page', page + 1)
  if (meta.tasks.length > 1) given.set('task', meta.tasks[filter.task].name)
  for (const key of Object.keys(ALL)) if (filter[key] !== ALL[key]) given.set(key, filter[key])
  for (const number of filter.classes) given.append('class', meta.classes[number][0])
  history.replaceState(null, '', `#${given}`)
}

function showControls() {
  for (const key of ['from', 'to', 'state', 'order']) find(key).value = filter[key]
  for (const key of ['from', 'to']) find(key).disabled = meta.tasks[filter.task].isText
  find('tasks').querySelectorAll('input')[filter.task].checked = true
  showScores()
  showClasses()
}

function showScores() {
  for (const key of ['from', 'to']) find(`${key}Shown`).textContent = (filter[key] / 100).toFixed(2)
}

function showClasses() {
  const wanted = find('search').value.trim().toLowerCase()
  const counted = meta.counts.filter(([task]) => task === filter.task).sort((a, b) => b[2] - a[2])
  find('classes').hidden = !counted.length
  const named = counted.filter(([, number]) => meta.classes[number][0].toLowerCase().includes(wanted))
  find('chips').replaceChildren(...named.slice(0, 200).map(([, number, count]) => {
    const [name, colour] = meta.classes[number]
    const input = make('input', { type: 'checkbox', checked: filter.classes.has(number) })
    input.onchange = () => { input.checked ? filter.classes.add(number) : filter.classes.delete(number); update() }
    const dot = make('i')
    dot.style.background = colour
    const text = make('span', {}, [dot, `${name} `, make('small', { textContent: count.toLocaleString() })])
    return make('label', { className: 'chip' }, [input, text])
  }))
  if (named.length > 200) find('chips').append(make('small', { textContent: `and ${named.length - 200} more` }))
}

async function update(first = 0) {
  const mine = ++turn
  find('status').textContent = 'reading the index ...'
  const found = await gallery.select(filter)
  if (mine !== turn) return
  selected = found
  page = first
  await showPage()
}

async function showPage() {
  const mine = ++turn
  const pages = Math.max(Math.ceil(selected.length / PAGE), 1)
  page = Math.min(Math.max(page, 0), pages - 1)
  const images = [...selected.slice(page * PAGE, (page + 1) * PAGE)]
  const missing = error => ({ i: '', e: ['missing', String(error)] })
  const found = await Promise.all(images.map(image => gallery.card(image).catch(missing)))
  if (mine !== turn) return
  observer.disconnect()
  visible.clear()
  cards = found.map((card, place) => makeCard(images[place], card, place))
  find('cards').replaceChildren(...cards.map(({ item }) => item))
  cards.forEach(({ frame }) => frame && observer.observe(frame))
  current = 0
  setTabStop()
  Object.assign(find('page'), { value: page + 1, max: pages })
  find('pages').textContent = pages.toLocaleString()
  const isAll = selected.length === meta.images
  const of = isAll ? '' : `of ${meta.images.toLocaleString()} `
  find('status').textContent = `${selected.length.toLocaleString()} ${of}images`
  for (const id of ['first', 'previous']) find(id).disabled = page === 0
  for (const id of ['last', 'next']) find(id).disabled = page === pages - 1
  writeAddress()
}

async function turnTo(number) {
  page = number
  await showPage()
  scrollTo(0, Math.min(scrollY, find('cards').offsetTop - 80))
}

function makeCard(image, card, place) {
  const caption = make('div', { className: 'caption', id: `caption${place}` })
  const button = make('button', { type: 'button', className: 'picture', tabIndex: -1 })
  button.setAttribute('aria-labelledby', caption.id)
  const made = { image, card, button, caption, item: make('li', {}, [button, caption]) }
  button.onclick = () => open(place)
  button.onfocus = () => { current = place; setTabStop() }
  if (card.e) {
    button.append(reason(card, 'span'))
  } else {
    made.canvas = make('canvas')
    made.frame = make('span', { className: 'frame' }, [
      make('img', { loading: 'lazy', decoding: 'async', alt: '', src: gallery.thumbnail(image) }), made.canvas,
    ])
    made.frame.style.aspectRatio = `${card.s[0]} / ${card.s[1]}`
    made.frame.classList.toggle('tall', card.s[0] / card.s[1] < 4 / 3)
    made.canvas.ariaHidden = 'true'
    made.frame.made = made
    button.append(made.frame)
  }
  describe(caption, card)
  return made
}

// Why an image has no picture.
function reason(card, tag) {
  return make(tag, { className: 'failed' }, [make('code', { textContent: card.e[0] }), card.e[1]])
}

// Id, what was found and the texts, in words.
function describe(element, card) {
  const instances = instancesOf(card)
  const counts = new Map()
  for (const [phrase] of instances) counts.set(phrase, (counts.get(phrase) ?? 0) + 1)
  const words = [...counts].map(([phrase, count]) => `${count} × ${meta.classes[phrase][0]}`)
  const lowest = Math.min(...instances.map(([, score]) => score))
  const nothing = card.e ? 'not labelled' : meta.tasks[filter.task].isText ? '' : 'nothing found'
  const found = instances.length ? `${words.join(', ')}; lowest score ${(lowest / 1000).toFixed(2)}` : nothing
  const texts = Object.entries(card.x ?? {}).flatMap(([task, pairs]) => pairs.map(([question, answer]) =>
    make('p', { className: 'text' }, [make('span', { textContent: question || meta.tasks[task].name }), ` ${answer}`])))
  const name = make('b', { textContent: card.i, title: card.p ?? '' })
  element.replaceChildren(name, make('p', { textContent: found }), ...texts)
}

// Boxes are drawn on cards in sight alone, and again when a filter changes.
const visible = new Set()
const observer = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    isIntersecting ? visible.add(target.made) : visible.delete(target.made)
    isIntersecting ? redraw(target.made) : Object.assign(target.made.canvas, { width: 0, height: 0 })
  }
}, { rootMargin: '200px' })

function redraw({ canvas, frame, card }) {
  const size = [frame.clientWidth, frame.clientHeight]
  if (size[0] && size[1]) drawing.draw(canvas, size, card, instancesOf(card), meta, meta.edges[filter.task])
}

function setTabStop() {
  cards.forEach(({ button }, place) => { button.tabIndex = place === current ? 0 : -1 })
}

function focusCard(place) {
  current = Math.min(Math.max(place, 0), cards.length - 1)
  setTabStop()
  cards[current]?.button.focus()
}

async function move(step) {
  const target = current + step
  if (target >= 0 && target < cards.length) return focusCard(target)
  const next = page + Math.sign(step)
  if (next < 0 || next * PAGE >= selected.length) return
  await turnTo(next)
  focusCard(step > 0 ? 0 : cards.length - 1)
}

function open(place) {
  current = place
  opened = cards[place]
  const { card, image } = opened
  find('largeName').textContent = card.i
  describe(find('largeText'), card)
  find('largePicture').replaceChildren(card.e ? reason(card, 'p') : largePicture(card, image))
  if (!find('large').open) find('large').showModal()
  drawLarge()
}

// The thumbnail, and then the image file itself where the browser can reach it.
function largePicture(card, image) {
  const shown = make('img', { alt: '', src: gallery.thumbnail(image) })
  const isFile = card.p.startsWith('/') && !/\.(parquet|tar)$/i.test(card.p)
  if (location.protocol === 'file:' && isFile) {
    const stored = new Image()
    stored.onload = () => {
      if (stored.naturalWidth === card.s[0] && stored.naturalHeight === card.s[1]) shown.src = stored.src
    }
    stored.src = 'file://' + card.p.split('/').map(encodeURIComponent).join('/')
  }
  return make('span', { className: 'frame' }, [shown, make('canvas')])
}

function drawLarge() {
  const frame = find('largePicture').querySelector('.frame')
  if (!frame || !opened) return
  const { card } = opened
  const scale = Math.min(0.94 * innerWidth / card.s[0], (innerHeight - 170) / card.s[1])
  const size = card.s.map(side => Math.max(Math.round(side * scale), 1))
  Object.assign(frame.style, { width: `${size[0]}px`, height: `${size[1]}px` })
  drawing.draw(frame.querySelector('canvas'), size, card, instancesOf(card), meta, meta.edges[filter.task])
}

async function openNext(step) {
  await move(step)
  if (cards[current] !== opened) open(current)
}

for (const key of ['state', 'order']) find(key).onchange = event => { filter[key] = event.target.value; update() }
let pause
for (const key of ['from', 'to']) {
  find(key).oninput = event => {
    filter[key] = Number(event.target.value)
    showScores()
    visible.forEach(made => { redraw(made); describe(made.caption, made.card) })
    clearTimeout(pause)
    pause = setTimeout(update, 250) // the pages, once the slider rests
  }
}
find('search').oninput = showClasses
find('search').onkeydown = event => { if (event.key === 'Enter') find('chips').querySelector('input')?.click() }
find('filters').onsubmit = event => event.preventDefault()
find('reset').onclick = () => {
  Object.assign(filter, ALL)
  filter.classes.clear()
  find('search').value = ''
  showControls()
  update()
}
find('first').onclick = () => turnTo(0)
find('previous').onclick = () => turnTo(page - 1)
find('next').onclick = () => turnTo(page + 1)
find('last').onclick = () => turnTo(Math.ceil(selected.length / PAGE) - 1)
find('page').onchange = event => turnTo((Math.round(event.target.value) || 1) - 1)
find('largePrevious').onclick = () => openNext(-1)
find('largeNext').onclick = () => openNext(1)
find('largeClose').onclick = () => find('large').close()
find('large').onclick = event => { if (event.target === find('large')) find('large').close() }
find('large').onclose = () => { // after the browser has moved the focus to the card that was opened first
  const place = cards.indexOf(opened)
  opened = null
  focusCard(place)
}
addEventListener('hashchange', () => { readAddress(); showControls(); update(page) })
addEventListener('resize', () => { visible.forEach(redraw); drawLarge() })

const columns = () => cards.filter(({ item }) => item.offsetTop === cards[0].item.offsetTop).length || 1
const MOVES = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -columns(), ArrowDown: columns }

document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (find('large').open) {
    const step = { ArrowLeft: -1, ArrowUp: -1, PageUp: -1, ArrowRight: 1, ArrowDown: 1, PageDown: 1 }[event.key]
    if (step) { event.preventDefault(); openNext(step) }
    return
  }
  if (event.target.matches('input, select')) {
    if (event.key === 'Escape') focusCard(current)
    return
  }
  if (event.key === '/') {
    event.preventDefault()
    find('box').open = true
    find(find('classes').hidden ? 'state' : 'search').focus()
  }
  const step = { PageDown: 1, PageUp: -1 }[event.key]
  if (step) {
    event.preventDefault()
    if (!find(step > 0 ? 'next' : 'previous').disabled) turnTo(page + step).then(() => focusCard(0))
  }
  if (event.key in MOVES) {
    event.preventDefault()
    event.target.matches('.picture') ? move(MOVES[event.key]()) : focusCard(current)
  }
})
