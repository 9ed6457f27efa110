// A request as a command and as a program. Both read the image from its file, and the key from LUMEN_API_KEY.
import { address, hasKey, picturesOf, stringify } from "./api.js"

const TOKEN = "\u{f0000}" // marks the place of an image in JSON; of a plane that nobody writes in

function located(body) {
  const pictures = picturesOf(body)
  const text = stringify(body, (picture, isUrl) => `${isUrl ? `data:${picture.blob.type};base64,` : ""}${TOKEN}`
    + `${pictures.indexOf(picture)}${TOKEN}`)
  return { pictures, body: JSON.parse(text) }
}

// Names of files, different for different pictures.
function fileNames(pictures) {
  const names = pictures.map(picture => picture.name)
  return names.map((name, n) => (names.indexOf(name) === n ? name : name.replace(/(\.\w+)?$/, `-${n + 1}$1`)))
}

const shellQuoted = text => `'${text.replaceAll("'", "'\\''")}'`

export function asCurl(request) {
  const { pictures, body } = located(request.body), names = fileNames(pictures), lines = []
  const variable = n => (n ? `image${n + 1}` : "image")
  pictures.forEach((picture, n) => {
    lines.push(`${variable(n)}=${shellQuoted(names[n])}${remark(picture)}`)
    if (picture.url) lines.push(`curl -s -o "$${variable(n)}" ${shellQuoted(picture.url)}`)
  })
  const json = JSON.stringify(body, null, 2)
    .replace(/[\\$`]/g, "\\$&")
    .replace(new RegExp(`${TOKEN}(\\d+)${TOKEN}`, "gu"), (_, n) => `$(base64 < "$${variable(Number(n))}" | tr -d '\\n')`)
  const key = hasKey() ? ' -H "Authorization: Bearer $LUMEN_API_KEY"' : ""
  const url = shellQuoted(address(request.path))
  lines.push(`curl -s ${url} -H 'Content-Type: application/json'${key} -d @- <<END`, json, "END")
  return `${lines.join("\n")}\n`
}

const remark = picture => (picture.original ? "  # a smaller copy: save it from the page, 'Image as sent'" : "")

export function asPython(request) {
  const { pictures, body } = located(request.body), names = fileNames(pictures).map(name => JSON.stringify(name))
  const needsKey = hasKey()
  const lines = [...(pictures.length ? ["import base64"] : []), ...(needsKey ? ["import os"] : [])]
  lines.push(...(lines.length ? [""] : []), "import requests", "", "")
  if (pictures.length) {
    lines.push("def encoded(path):", '    with open(path, "rb") as file:')
    lines.push("        return base64.b64encode(file.read()).decode()", "", "")
  }
  pictures.forEach((picture, n) => {
    if (picture.url) {
      lines.push(`with open(${names[n]}, "wb") as file:`)
      lines.push(`    file.write(requests.get(${JSON.stringify(picture.url)}).content)`)
    } else if (picture.original) {
      lines.push(`#${remark(picture).slice(3)}: ${names[n]}`)
    }
  })
  const literal = pythonLiteral(body, "").replace(new RegExp(`"([^"]*)${TOKEN}(\\d+)${TOKEN}"`, "gu"), (_, before, n) => {
    const call = `encoded(${names[n]})`
    return before ? `"${before}" + ${call}` : call
  })
  lines.push(`body = ${literal}`)
  const headers = needsKey ? ', headers={"Authorization": f"Bearer {os.environ[\'LUMEN_API_KEY\']}"}' : ""
  lines.push(`response = requests.post(${JSON.stringify(address(request.path))}, json=body${headers})`)
  lines.push("print(response.json())")
  return `${lines.join("\n")}\n`
}

// A JSON value in Python, whose texts are written as JSON's are. Short ones are on one line.
function pythonLiteral(value, indent) {
  if (value === null) return "None"
  if (typeof value === "boolean") return value ? "True" : "False"
  if (typeof value !== "object") return JSON.stringify(value)
  const isList = Array.isArray(value), [open, close] = isList ? "[]" : "{}", deeper = `${indent}    `
  const write = isList ? inner => value.map(item => pythonLiteral(item, inner))
    : inner => Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${pythonLiteral(item, inner)}`)
  const line = `${open}${write("").join(", ")}${close}`
  if (indent && line.length < 90 && !line.includes("\n")) return line
  return `${open}\n${write(deeper).map(item => `${deeper}${item},\n`).join("")}${indent}${close}`
}
