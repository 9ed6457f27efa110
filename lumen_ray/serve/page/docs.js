// The reference of the API, from openapi.json.
const make = (tag, text = "", ...children) => { const node = document.createElement(tag); node.textContent = text; node.append(...children); return node; };
const nameOf = ref => ref.split("/").pop();
function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.enum) return schema.enum.map(value => typeof value === "string" ? value : JSON.stringify(value)).join(" | ");
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.filter(o => o.type !== "null").map(typeOf).join(" or ");
  if (schema.type === "array") return schema.items ? `list of ${typeOf(schema.items)}` : `list of ${schema.minItems ?? ""} values`;
  return schema.type || "any";
}
function fields(schema) {
  const table = make("table");
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const row = table.insertRow(), required = (schema.required || []).includes(name);
    row.insertCell().append(make("code", name));
    row.insertCell().textContent = typeOf(field) + (required ? "" : ", optional");
    row.insertCell().textContent = field.description || "";
  }
  return table;
}
async function start() {
  const api = await (await fetch("openapi.json")).json(), groups = {};
  document.getElementById("version").textContent = api.info.version;
  document.getElementById("origin").textContent = location.origin;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const summary = make("summary", "", make("b", method.toUpperCase()), make("code", path), make("span", `  ${route.summary || ""}`));
      const entry = make("details", "", summary);
      for (const [kind, {schema}] of Object.entries(route.requestBody?.content || {})) {
        entry.append(make("p", `Body, ${kind}: ${schema.$ref ? nameOf(schema.$ref) : schema.description || ""}`));
        entry.append(fields(schema.$ref ? api.components.schemas[nameOf(schema.$ref)] : schema));
      }
      const answer = route.responses?.[200]?.content?.["application/json"]?.schema;
      if (answer?.$ref) entry.append(make("p", `Answer: ${nameOf(answer.$ref)}`), fields(api.components.schemas[nameOf(answer.$ref)]));
      (groups[(route.tags || ["about"])[0]] ??= []).push(entry);
    }
  }
  for (const [group, entries] of Object.entries(groups)) document.getElementById("routes").append(make("h2", group), ...entries);
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    document.getElementById("schemas").append(make("details", "", make("summary", "", make("code", name)), make("p", schema.description || ""), fields(schema)));
  }
}
start();
