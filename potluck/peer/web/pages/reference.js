// The API, drawn from its OpenAPI description.
import { h, head } from "./dom.js";

export async function show(page) {
  page.title("API");
  const description = await (await fetch("/api/v1/openapi.json")).json();
  page.main.append(head("API", null, description.info.description, h("span", {}, "The same for programs: ", h("a", { href: "/api/v1/openapi.json" }, "openapi.json"), ". For Prometheus: ", h("code", {}, "/metrics"), page.list.machine ? ". Each request bears the token: Authorization: Bearer …, as the file “token” in the home has it." : ".")));
  const groups = new Map();
  for (const [path, verbs] of Object.entries(description.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) {
      const tag = operation.tags?.[0] ?? "other";
      groups.set(tag, [...(groups.get(tag) ?? []), entry(path, verb, operation, description)]);
    }
  }
  for (const [tag, entries] of groups) page.main.append(h("section", { class: "card" }, h("h2", {}, tag === "machine" ? "This machine" : "Runs"), entries));
}

function entry(path, verb, operation, description) {
  const parameters = operation.parameters ?? [], body = operation.requestBody?.content?.["application/json"]?.schema;
  const [kind, content] = Object.entries(operation.responses["200"].content ?? {})[0] ?? ["", {}];
  return h("article", { class: "api" }, h("h3", { class: "mono" }, h("span", { class: `verb ${verb}` }, verb.toUpperCase()), ` ${path}`),
    h("p", {}, prose(operation.description ?? operation.summary)),
    parameters.length ? h("ul", { class: "small" }, parameters.map((one) => h("li", {}, h("code", {}, one.name), ` ${one.in === "path" ? "in the path" : "in the query"}${one.schema.default !== undefined ? `, ${one.schema.default} if left out` : ""}: ${one.description ?? ""}`))) : null,
    body ? shape("Takes", body, description) : null, kind === "application/json" ? shape("Answers with", content.schema, description) : h("p", { class: "quiet small" }, `Answers with ${kind}`));
}

// What stands between backticks is code.
const prose = (text) => text.split("`").map((part, n) => (n % 2 ? h("code", {}, part) : part));

const resolve = (schema, description) => (schema.$ref ? { name: schema.$ref.split("/").pop(), ...description.components.schemas[schema.$ref.split("/").pop()] } : schema);

function kindOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kindOf).join(" or ");
  if (schema.type === "array") return `list of ${kindOf(schema.items ?? {})}`;
  return schema.type ?? "anything";
}

function shape(title, schema, description) {
  const whole = resolve(schema, description), fields = Object.entries(whole.properties ?? {});
  return h("details", {}, h("summary", {}, `${title} ${whole.name ?? "an object"}`), whole.description ? h("p", { class: "small" }, prose(whole.description)) : null,
    h("ul", { class: "small" }, fields.map(([name, field]) => h("li", {}, h("code", {}, name), `: ${kindOf(field)}${field.description ? `, ${field.description}` : ""}`))));
}
