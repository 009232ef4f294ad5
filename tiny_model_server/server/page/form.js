// A form for a value that a JSON schema describes: a field for each property, JSON for what is nested.

import { isArray } from "./arrays.js";
import { h } from "./dom.js";

/** What a schema's $ref and its choice between one type and null stand for. */
export function resolve(schema, root) {
  for (let depth = 0; depth < 20 && schema; depth++) {
    const parts = schema.anyOf ?? schema.oneOf ?? schema.allOf;
    const others = parts?.filter(part => part.type !== "null");
    if (schema.$ref?.startsWith("#/"))
      schema = {
        ...schema.$ref
          .slice(2)
          .split("/")
          .reduce((at, key) => at?.[key], root),
        ...rest(schema, "$ref"),
      };
    else if (others?.length === 1) schema = { ...others[0], ...rest(schema, "anyOf", "oneOf", "allOf") };
    else break;
  }
  if (Array.isArray(schema?.type)) {
    const types = schema.type.filter(type => type !== "null");
    if (types.length === 1) schema = { ...schema, type: types[0] };
  }
  return schema ?? {};
}

const rest = (object, ...keys) => Object.fromEntries(Object.entries(object).filter(([key]) => !keys.includes(key)));

/** Whether a form can be made for it. */
export function hasForm(schema) {
  const { properties } = resolve(schema, schema);
  return Boolean(properties && Object.keys(properties).length);
}

export class Form {
  constructor(schema, value) {
    const { properties, required = [] } = resolve(schema, schema);
    this.fields = Object.entries(properties).map(([name, property]) => {
      const found = resolve(property, schema);
      const initial = value?.[name] ?? found.default;
      return {
        name,
        required: required.includes(name),
        ...field(found, initial, required.includes(name)),
        about: found,
      };
    });
    this.element = h("div", { class: "form" }, ...this.fields.map(label));
  }

  /** The value; an Error that names the field whose content is wrong. */
  read() {
    const value = {};
    for (const { name, read, required } of this.fields) {
      let found;
      try {
        found = read();
      } catch (error) {
        throw new Error(`${name}: ${error.message}`);
      }
      if (found !== undefined) value[name] = found;
      else if (required) throw new Error(`${name} is missing`);
    }
    return value;
  }
}

function label({ name, required, input, about }) {
  const note = about.description ?? "";
  const text = h("span", { class: "field" }, name, required ? "" : h("span", { class: "muted" }, " optional"));
  if (input.type === "checkbox") return h("label", { class: "check", title: note }, input, text);
  return h("label", { title: note }, text, input, note ? h("span", { class: "muted note" }, note) : null);
}

function field(schema, initial, required) {
  const options = schema.enum ?? ("const" in schema ? [schema.const] : null);
  if (options) return choice(options, initial, required);
  if (schema.type === "boolean") return check(initial);
  if (schema.type === "integer" || schema.type === "number") return number(schema, initial);
  if (schema.type === "string") return text(schema, initial);
  return isColourImage(schema) ? file(initial) : json(initial);
}

const isColourImage = schema =>
  schema["x-dtype"] === "uint8" && schema["x-shape"]?.length === 3 && schema["x-shape"][2] === 3;

function file(initial) {
  const input = h("input", { type: "file", accept: "image/*" });
  return { input, read: () => input.files[0] ?? (isArray(initial) ? initial : undefined) };
}

function choice(options, initial, required) {
  const input = h(
    "select",
    {},
    ...(required ? [] : [h("option", { value: "" }, "")]),
    ...options.map((option, index) => h("option", { value: index, selected: option === initial }, String(option))),
  );
  return { input, read: () => (input.value === "" ? undefined : options[Number(input.value)]) };
}

function check(initial) {
  const input = h("input", { type: "checkbox", checked: initial === true });
  return { input, read: () => input.checked };
}

function number(schema, initial) {
  const input = h("input", {
    type: "number",
    step: schema.type === "integer" ? 1 : "any",
    min: schema.minimum,
    max: schema.maximum,
    value: initial,
  });
  return {
    input,
    read: () => {
      if (input.validity.badInput) throw new Error("not a number");
      return input.value === "" ? undefined : Number(input.value);
    },
  };
}

function text(schema, initial) {
  const long = String(initial ?? "").length > 60;
  const input = h(long ? "textarea" : "input", long ? { rows: 3 } : { type: "text", maxlength: schema.maxLength });
  input.value = initial ?? "";
  let touched = initial !== undefined && initial !== null;
  input.addEventListener("input", () => {
    touched = true;
  });
  return { input, read: () => (touched || input.value ? input.value : undefined) };
}

function json(initial) {
  const input = h("textarea", { rows: 2, class: "code", placeholder: "JSON", spellcheck: "false" });
  input.value = initial === undefined || initial === null ? "" : JSON.stringify(initial);
  return { input, read: () => (input.value.trim() ? parseJson(input.value) : undefined) };
}

export function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`this is not JSON: ${error.message}`);
  }
}
