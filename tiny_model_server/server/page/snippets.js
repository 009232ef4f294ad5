// The call that the page makes, as code to copy: Python, curl, grpcurl.

import { base64, complete, elements, isArray, shape } from "./arrays.js";
import { hasToken } from "./api.js";

export const LANGUAGES = { python: "Python", curl: "curl", grpcurl: "grpcurl" };
const LONGEST = 20_000;  // characters of an input that a snippet holds

export function snippet(language, name, input, streams, server) {
  const text = { python, curl, grpcurl }[language](name, input, streams, server);
  return text.length <= LONGEST ? text : `${text.slice(0, LONGEST)}\n… (the input is too long to be shown)`;
}

const grpcAddress = server => `${location.hostname}:${server.grpc_port || 50000}`;
const isSecure = () => location.protocol === "https:";
const hasArgs = input => Object.keys(input.args).length > 0;

// ---- Python

function python(name, input, streams, server) {
  const method = streams ? "run_stream" : { image: "run_image", text: "run_text", data: "run" }[input.kind];
  let value = input.kind === "data" ? pythonValue(input.value) : pythonText(input.kind === "image" ? input.value.name : input.value);
  if (streams && input.kind === "image") value = `open(${value}, "rb").read()`;
  const numpy = value.includes("np."), args = hasArgs(input) ? `, ${pythonValue(input.args)}` : "";
  const options = [pythonText(name), `addresses=${pythonText(grpcAddress(server))}`, ...(isSecure() ? ["tls=True"] : [])];
  const imports = `${numpy ? "import numpy as np\n\n" : ""}from model_client import ModelClient\n\n${hasToken() ? "# with TMS_TOKEN in the environment\n" : ""}`;
  const call = `model.${method}(${value}${args})`;
  return `${imports}model = ModelClient(${options.join(", ")})\n${streams ? `for value in ${call}:\n    print(value)` : `print(${call})`}`;
}

const CONSTANTS = { true: "True", false: "False", null: "None" };

function pythonValue(value) {
  if (isArray(value)) return pythonArray(value);
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([key, item]) => `${pythonText(key)}: ${pythonValue(item)}`).join(", ")}}`;
  return typeof value === "string" ? pythonText(value) : CONSTANTS[value] ?? JSON.stringify(value);
}

function pythonArray(array) {
  const { dtype, data } = array.$array, sizes = shape(array);
  if (data === undefined || elements(array).every(one => !one)) return `np.zeros([${sizes.join(", ")}], ${pythonText(dtype)})`;
  const made = `np.array(${pythonValue(data)}, ${pythonText(dtype)})`;
  return array.$array.shape && !Array.isArray(data[0]) && sizes.length > 1 ? `${made}.reshape([${sizes.join(", ")}])` : made;
}

/** A JSON text is a Python text, too, but for the escapes of surrogate pairs, which JSON.stringify leaves as they are. */
const pythonText = text => JSON.stringify(text).replace(/\x7f/g, "\\x7f");

// ---- curl

function curl(name, input, streams) {
  const field = { image: () => `-F ${quoted(`image=@${curlName(input.value.name)}`)}`, text: () => `--form-string ${quoted(`text=${input.value}`)}`,
    data: () => `--form-string ${quoted(`data=${JSON.stringify(complete(input.value))}`)}` }[input.kind]();
  const url = new URL(`models/${encodeURIComponent(name)}/run`, location.href);
  url.hash = "";
  const parts = [`curl${streams ? " -N -H 'Accept: text/event-stream'" : ""}`, ...(hasToken() ? ['-H "Authorization: Bearer $TMS_TOKEN"'] : []), field,
    ...(hasArgs(input) ? [`--form-string ${quoted(`args=${JSON.stringify(input.args)}`)}`] : []), quoted(url.href)];
  return parts.join(" \\\n  ");
}

/** A file's name for -F, in which ; and , have a meaning. */
const curlName = name => /[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;

const quoted = text => /^[\w.:/=@%+-]+$/.test(text) ? text : `'${text.replace(/'/g, `'\\''`)}'`;

// ---- grpcurl

function grpcurl(name, input, streams, server) {
  const args = hasArgs(input) ? { args: JSON.stringify(input.args) } : {}, options = [isSecure() ? "" : "-plaintext ", hasToken() ? '-H "authorization: Bearer $TMS_TOKEN" ' : ""].join("");
  const end = method => `${quoted(grpcAddress(server))} server.Server/${method}`;
  if (input.kind === "image") {
    const image = { encoded: true, data: "FILE" }, message = streams ? { model: name, data: { json: '{"$image": 0}', arrays: [{ dtype: "uint8", shape: [input.value.size ?? 0], data: "FILE" }] }, ...args } : { model: name, image, ...args };
    const [before, after] = JSON.stringify(message).split('"FILE"');
    return `(printf %s ${quoted(`${before}"`)}; base64 < ${quoted(input.value.name)} | tr -d '\\n'; printf %s ${quoted(`"${after}`)}) |\n  grpcurl ${options}-d @ ${end(streams ? "RunStream" : "RunImage")}`;
  }
  const isText = input.kind === "text" && !streams;
  const message = { model: name, ...(isText ? { text: input.value } : { data: value(input.value) }), ...args };
  return `grpcurl ${options}-d ${quoted(JSON.stringify(message))} \\\n  ${end(streams ? "RunStream" : isText ? "RunText" : "Run")}`;
}

/** A Value of server.proto: JSON that refers to arrays. */
function value(found) {
  const arrays = [];
  const refer = one => {
    if (isArray(one)) return { $array: arrays.push({ dtype: one.$array.dtype, shape: shape(one), data: base64(one) }) - 1 };
    if (Array.isArray(one)) return one.map(refer);
    if (!one || typeof one !== "object") return one;
    const inner = Object.fromEntries(Object.entries(one).map(([key, item]) => [key, refer(item)]));
    return Object.keys(one).some(key => key.startsWith("$")) ? { $dict: inner } : inner;
  };
  const json = JSON.stringify(refer(found));
  return arrays.length ? { json, arrays } : { json };
}
