// The page for openapi.json: lists the operations with their schemas, and sends requests.
const KEY = "tiny-model-server-token";  // as the other page keeps it
const token = document.getElementById("token");
token.value = sessionStorage.getItem(KEY) ?? "";
let api = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token.value ? { Authorization: `Bearer ${token.value}` } : {}) };
  return fetch(path, { ...options, headers });
}

/** What a reference in the document stands for. */
function resolve(value) {
  if (!value?.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((found, key) => found[key], api);
}

const json = (value) => element("pre", { textContent: JSON.stringify(value, null, 2) });

/** A folded schema; what it refers to is shown below it. */
function schemas(title, content) {
  const parts = Object.entries(content ?? {}).filter(([, { schema }]) => schema && Object.keys(schema).length);
  return parts.map(([type, { schema }]) => {
    const names = [...new Set(JSON.stringify(schema).match(/#\/components\/schemas\/[\w.-]+/g) ?? [])];
    const others = names.map((name) => [element("p", { textContent: name }), json(resolve({ $ref: name }))]);
    return element("details", {}, element("summary", { textContent: `${title}: ${type}` }), json(schema), ...others.flat());
  });
}

function field(label, input) {
  return element("label", {}, label, input);
}

function choice(values) {
  return element("select", {}, ...values.map((value) => element("option", { textContent: value })));
}

/** A form that sends the operation's request. */
function trial(method, path, operation) {
  const parameters = operation.parameters.map((one) => {
    const values = one.schema?.enum;
    return { ...one, input: values ? choice(values) : element("input", { placeholder: one.in === "query" ? "{}" : "" }) };
  });
  const content = resolve(operation.requestBody)?.content;
  const type = choice(Object.keys(content ?? {}).filter((kind) => !kind.startsWith("multipart")));
  const example = content?.["application/json"]?.example;
  const body = element("textarea", { rows: 4, value: example === undefined ? "" : JSON.stringify(example) });
  const file = element("input", { type: "file" });
  const accept = choice(Object.keys(operation.responses["200"].content));
  const answer = element("div", { ariaLive: "polite" });
  const form = element("form", {}, ...parameters.map((one) => field(`${one.name} (${one.in})`, one.input)),
    ...(content ? [field("Content-Type", type), field("Body", body), field("or a file", file)] : []),
    field("Accept", accept), element("p", {}, element("button", { textContent: "Send" })), answer);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const query = new URLSearchParams();
    let url = path.slice(1);
    for (const { name, in: place, input } of parameters) {
      if (place === "path") url = url.replace(`{${name}}`, encodeURIComponent(input.value));
      else if (input.value) query.set(name, input.value);
    }
    const headers = { Accept: accept.value };
    if (content) headers["Content-Type"] = file.files[0]?.type || type.value;
    answer.replaceChildren("…");
    try {
      const options = { method, headers, ...(content ? { body: file.files[0] ?? body.value } : {}) };
      answer.replaceChildren(...await shown(await ask(query.size ? `${url}?${query}` : url, options)));
    } catch (error) {
      answer.replaceChildren(element("p", { className: "error", textContent: String(error) }));
    }
  });
  return form;
}

async function shown(response) {
  const type = response.headers.get("Content-Type") ?? "";
  const facts = `${response.status} ${response.statusText}, ${type}, id ${response.headers.get("X-Request-Id")}`;
  const line = element("p", { className: response.ok ? "" : "error", textContent: facts });
  if (/json|text/.test(type)) return [line, element("pre", { textContent: await response.text() })];
  const blob = await response.blob(), url = URL.createObjectURL(blob);
  if (type.startsWith("image/")) return [line, element("img", { src: url, alt: "the answer" })];
  return [line, element("a", { href: url, download: "answer", textContent: `save ${blob.size} bytes` })];
}

function operation(path, method, described) {
  const errors = Object.entries(described.responses).filter(([code]) => code !== "200");
  const opened = element("details", {}, element("summary", {},
    element("b", { textContent: method.toUpperCase() }), ` ${path} `,
    element("span", { className: "muted", textContent: described.summary })));
  opened.addEventListener("toggle", () => {
    if (!opened.open || opened.children.length > 1) return;
    opened.append(trial(method.toUpperCase(), path, described),
      ...schemas("Body", described.requestBody?.content), ...schemas("Answer", described.responses["200"].content),
      element("details", {}, element("summary", { textContent: "Errors" }),
        element("ul", {}, ...errors.map(([code, one]) => element("li", { textContent: `${code}: ${one.description}` })))));
  });
  return opened;
}

async function load() {
  sessionStorage.setItem(KEY, token.value);
  const response = await ask("openapi.json");
  const found = await response.json();
  document.getElementById("error").textContent = response.ok ? "" : found.error;
  if (!response.ok) return;
  api = found;
  const all = Object.entries(api.paths).flatMap(([path, item]) =>
    Object.entries(item).map(([method, described]) => ({ tag: described.tags[0], made: operation(path, method, described) })));
  const tags = [...new Set(all.map(({ tag }) => tag))].sort((a, b) => (a === "server") - (b === "server"));
  document.getElementById("operations").replaceChildren(...tags.flatMap((tag) =>
    [element("h2", { textContent: tag }), ...all.filter((one) => one.tag === tag).map(({ made }) => made)]));
}

token.addEventListener("change", load);
document.getElementById("ask").addEventListener("submit", (event) => event.preventDefault());
load();
