// The call that the page makes, as code to copy: Python, curl, grpcurl.

import { base64, complete, elements, isArray, shape } from "./arrays.js";
import { hasToken } from "./api.js";
import { files } from "./input.js";

export const LANGUAGES = { python: "Python", curl: "curl", grpcurl: "grpcurl" };
const LONGEST = 20_000; // characters of an input that a snippet holds

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
  const value = method === "run_image" ? pythonText(input.value.name) : pythonValue(input.value);
  const numpy = value.includes("np.");
  const pillow = value.includes("Image.open(");
  const args = hasArgs(input) ? `, ${pythonValue(input.args)}` : "";
  const options = [
    pythonText(name),
    `addresses=${pythonText(grpcAddress(server))}`,
    ...(isSecure() ? ["tls=True"] : []),
  ];
  const lines = [
    numpy && "import numpy as np",
    pillow && "from PIL import Image",
    (numpy || pillow) && "",
    "from model_client import ModelClient",
    "",
    hasToken() && "# with TMS_TOKEN in the environment",
    `model = ModelClient(${options.join(", ")})`,
  ];
  const call = `model.${method}(${value}${args})`;
  lines.push(...(streams ? [`for value in ${call}:`, "    print(value)"] : [`print(${call})`]));
  return lines.filter(line => line !== false).join("\n");
}

const CONSTANTS = { true: "True", false: "False", null: "None" };

function pythonValue(value) {
  if (isArray(value)) return pythonArray(value);
  if (value instanceof File) return `Image.open(${pythonText(value.name)}).convert("RGB")`;
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (value && typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, item]) => `${pythonText(key)}: ${pythonValue(item)}`)
      .join(", ")}}`;
  return typeof value === "string" ? pythonText(value) : (CONSTANTS[value] ?? JSON.stringify(value));
}

function pythonArray(array) {
  const { dtype, data } = array.$array;
  const sizes = shape(array);
  if (data === undefined || elements(array).every(one => !one))
    return `np.zeros([${sizes.join(", ")}], ${pythonText(dtype)})`;
  const made = `np.array(${pythonValue(data)}, ${pythonText(dtype)})`;
  return array.$array.shape && !Array.isArray(data[0]) && sizes.length > 1
    ? `${made}.reshape([${sizes.join(", ")}])`
    : made;
}

/** A JSON text is a text of Python, too. */
const pythonText = text => JSON.stringify(text).replace(/\x7f/g, "\\x7f");

// ---- curl

function curl(name, input, streams) {
  const field = {
    image: () => `-F ${quoted(`image=@${curlName(input.value.name)}`)}`,
    text: () => `--form-string ${quoted(`text=${input.value}`)}`,
    data: () => curlData(input.value),
  }[input.kind]();
  const url = new URL(`models/${encodeURIComponent(name)}/run`, location.href);
  url.hash = "";
  const parts = [
    `curl${streams ? " -N -H 'Accept: text/event-stream'" : ""}`,
    ...(hasToken() ? ['-H "Authorization: Bearer $TMS_TOKEN"'] : []),
    field,
    ...(hasArgs(input) ? [`--form-string ${quoted(`args=${JSON.stringify(input.args)}`)}`] : []),
    quoted(url.href),
  ];
  return parts.join(" \\\n  ");
}

function curlData(value) {
  if (!files(value).length) return `--form-string ${quoted(`data=${JSON.stringify(complete(value))}`)}`;
  const field = ([name, item]) =>
    item instanceof File
      ? quoted(`${name}=@${curlName(item.name)}`)
      : name === "text" && typeof item === "string"
        ? quoted(`text="${item.replace(/["\\]/g, "\\$&")}"`)
        : quoted(`${name}="${JSON.stringify(complete(item)).replace(/["\\]/g, "\\$&")}";type=application/json`);
  return Object.entries(value)
    .map(one => `-F ${field(one)}`)
    .join(" \\\n  ");
}

/** A file's name for -F, in which ; and , have a meaning. */
const curlName = name => (/[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

const quoted = text => (/^[\w.:/=@%+-]+$/.test(text) ? text : `'${text.replace(/'/g, `'\\''`)}'`);

// ---- grpcurl

function grpcurl(name, input, streams, server) {
  const args = hasArgs(input) ? { args: JSON.stringify(input.args) } : {};
  const options = [isSecure() ? "" : "-plaintext ", hasToken() ? '-H "authorization: Bearer $TMS_TOKEN" ' : ""].join(
    "",
  );
  const method = streams ? "RunStream" : { image: "RunImage", text: "RunText", data: "Run" }[input.kind];
  const found = [];
  const content =
    method === "RunImage"
      ? { image: { encoded: true, data: marked(input.value, found) } }
      : method === "RunText"
        ? { text: input.value }
        : { data: message(input.value, found) };
  const text = JSON.stringify({ model: name, ...content, ...args });
  const call = `${quoted(grpcAddress(server))} server.Server/${method}`;
  if (!found.length) return `grpcurl ${options}-d ${quoted(text)} \\\n  ${call}`;
  const parts = text
    .split(MARK)
    .map((part, index) => [
      part && `printf %s ${quoted(part)}`,
      found[index] && `base64 < ${quoted(found[index].name)} | tr -d '\\n'`,
    ]);
  return `(${parts.flat().filter(Boolean).join("; ")}) |\n  grpcurl ${options}-d @ ${call}`;
}

const MARK = "\ufffc\ufffc"; // stands for a file's bytes

function marked(file, found) {
  found.push(file);
  return MARK;
}

/** A Value of server.proto: JSON that refers to arrays and files. */
function message(value, files) {
  const arrays = [];
  const refer = one => {
    if (isArray(one))
      return { $array: arrays.push({ dtype: one.$array.dtype, shape: shape(one), data: base64(one) }) - 1 };
    if (one instanceof File)
      return { $image: arrays.push({ dtype: "uint8", shape: [one.size], data: marked(one, files) }) - 1 };
    if (Array.isArray(one)) return one.map(refer);
    if (!one || typeof one !== "object") return one;
    const inner = Object.fromEntries(Object.entries(one).map(([key, item]) => [key, refer(item)]));
    return Object.keys(one).some(key => key.startsWith("$")) ? { $dict: inner } : inner;
  };
  const json = JSON.stringify(refer(value));
  return arrays.length ? { json, arrays } : { json };
}
