// Elements of the page.

export function find(id) { return document.getElementById(id) }

// make("button", {type: "button", onclick}, "text", child): an element with properties and children.
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties)
  node.append(...children)
  return node
}

// Says it to screen readers; nothing is seen.
export function announce(words) { find("status").textContent = words }

// The items of a comma-separated list.
export function items(words) { return words.split(",").map(word => word.trim()).filter(Boolean) }

export function plural(count, noun, nouns = `${noun}s`) { return `${count} ${count === 1 ? noun : nouns}` }
