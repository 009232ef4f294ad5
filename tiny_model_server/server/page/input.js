// What a model is to be run on: a form, an image, a text or JSON, and its args.

import { compact, complete, isImage, isImageShape, png } from "./arrays.js";
import { photo } from "./camera.js";
import { h } from "./dom.js";
import { Form, hasForm, parseJson, resolve } from "./form.js";

const KINDS = { form: "Form", image: "Image", text: "Text", json: "JSON" };
const canPhotograph = Boolean(navigator.mediaDevices?.getUserMedia);

export class Input {
  constructor(changed) {
    this.changed = changed;
    this.kind = "text";
    this.file = null;
    this.touched = false;
    this.known = "";
    this.tabs = Object.entries(KINDS).map(([kind, text]) =>
      h(
        "button",
        {
          type: "button",
          class: "chip",
          "data-kind": kind,
          click: () => {
            this.touched = true;
            this.show(kind);
          },
        },
        text,
      ),
    );
    this.text = h("textarea", { rows: 4, "aria-label": "Text", "data-input": "text" });
    this.json = h("textarea", {
      rows: 6,
      class: "code",
      "aria-label": "JSON",
      "data-input": "json",
      spellcheck: "false",
      placeholder: '{"key": [1, 2, 3]}',
    });
    const hint = h(
      "p",
      { class: "muted hint" },
      'An array: {"$array": {"dtype": "float32", "data": [1, 2]}}; of zeros: with "shape" and no "data"',
    );
    this.args = h("textarea", { rows: 1, class: "code", placeholder: "{}", "data-input": "args", spellcheck: "false" });
    this.form = this.argsForm = null;
    this.bodies = { form: h("div"), image: this.buildImage(), text: this.text, json: h("div", {}, this.json, hint) };
    this.argsBody = h("div");
    this.element = h(
      "div",
      {
        input: () => {
          this.touched = true;
          this.changed();
        },
      },
      h("div", { class: "row", role: "group", "aria-label": "Kind of input" }, h("h3", {}, "Input"), ...this.tabs),
      ...Object.values(this.bodies),
      this.argsBody,
    );
    this.showArgs();
    this.show("text");
  }

  buildImage() {
    const choose = h("input", {
      type: "file",
      accept: "image/*",
      hidden: true,
      "data-input": "file",
      change: () => {
        if (choose.files[0]) this.take(choose.files[0]);
        choose.value = "";
      },
    });
    this.preview = h("img", { alt: "The image that is sent", hidden: true });
    this.caption = h("span", { class: "muted" }, "Drop, paste or choose an image");
    const over = isOver => event => {
      event.preventDefault();
      drop.classList.toggle("over", isOver);
    };
    const drop = h(
      "div",
      {
        class: "drop",
        dragover: over(true),
        dragleave: over(false),
        drop: event => {
          over(false)(event);
          if (event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
        },
      },
      this.preview,
      this.caption,
      choose,
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", class: "quiet", click: () => choose.click() }, "Choose a file…"),
        canPhotograph
          ? h(
              "button",
              { type: "button", class: "quiet", "data-input": "camera", click: () => this.photograph() },
              "Camera…",
            )
          : null,
      ),
    );
    return drop;
  }

  async photograph() {
    const file = await photo();
    if (file) this.take(file);
  }

  paste(event) {
    const file = [...(event.clipboardData?.files ?? [])].find(one => one.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    this.take(file);
  }

  /** Takes an image as the input. */
  take(file, note = "") {
    this.touched ||= !note;
    this.file = file;
    URL.revokeObjectURL(this.preview.src);
    this.preview.src = URL.createObjectURL(file);
    this.preview.hidden = false;
    this.preview.onload = () => {
      this.preview.classList.toggle("tiny", this.preview.naturalWidth < 64);
      this.caption.textContent = `${note || file.name} · ${this.preview.naturalWidth}x${this.preview.naturalHeight}`;
    };
    this.preview.onerror = () => {
      this.caption.textContent = `${file.name}: the browser cannot show it`;
    };
    this.show("image");
  }

  /** Begins with the model's own example; what somebody has entered stays. */
  prefill({ schema, example, input_shape, metadata }) {
    const known = JSON.stringify([schema, example, input_shape, metadata]);
    if (this.touched || known === this.known) return;
    this.known = known;
    const data = schema?.data ? resolve(schema.data, schema.data) : declared(metadata.inputs, input_shape);
    this.form = hasForm(schema?.data) ? new Form(schema.data, example) : null;
    this.bodies.form.replaceChildren(...(this.form ? [this.form.element] : []));
    this.argsForm = hasForm(schema?.args) ? new Form(schema.args) : null;
    this.showArgs();
    if (typeof example === "string") this.text.value = example;
    else
      this.json.value = hasValue(example)
        ? JSON.stringify(compact(example))
        : data["x-dtype"]
          ? JSON.stringify(sketch(data))
          : "";
    if (isImage(example))
      png(example, "example.png").then(file => {
        if (file && !this.touched) this.take(file, "the model's example");
      });
    this.show(this.form ? "form" : kindOf(data, example));
  }

  showArgs() {
    const label = this.argsForm
      ? h("fieldset", {}, h("legend", {}, "Args"), this.argsForm.element)
      : h(
          "label",
          {},
          h("span", { class: "field" }, "Args ", h("span", { class: "muted" }, "a JSON object")),
          this.args,
        );
    this.argsBody.replaceChildren(label);
  }

  show(kind) {
    if (kind === "json" && this.kind === "form")
      this.keep(() => {
        this.json.value = JSON.stringify(this.form.read(), null, 1);
      });
    this.kind = kind;
    for (const [name, body] of Object.entries(this.bodies)) body.hidden = name !== kind;
    for (const tab of this.tabs) {
      tab.hidden = tab.dataset.kind === "form" && !this.form;
      tab.setAttribute("aria-pressed", String(tab.dataset.kind === kind));
    }
    this.changed();
  }

  keep(change) {
    try {
      change();
    } catch {
      /* what is incomplete stays in its form */
    }
  }

  /** What is to be sent. An Error says what is missing or wrong; a sketch may lack its image. */
  read(isSketch = false) {
    const args = this.argsForm ? this.argsForm.read() : readArgs(this.args.value);
    if (this.kind === "image") {
      if (!this.file && !isSketch) throw new Error("choose an image first");
      return content("image", this.file ?? new File([], "image.jpg"), args);
    }
    if (this.kind === "text") return content("text", this.text.value, args);
    return content("data", this.kind === "form" ? this.form.read() : parseJson(this.json.value || "null"), args);
  }
}

function content(kind, value, args) {
  return {
    kind,
    value,
    args,
    body: () => {
      const body = new FormData();
      if (kind === "data" && files(value).length) fill(body, value);
      else body.append(kind, kind === "data" ? JSON.stringify(complete(value)) : value);
      if (Object.keys(args).length) body.append("args", JSON.stringify(args));
      return body;
    },
  };
}

/** The image files of a form's value. */
export const files = value =>
  value && typeof value === "object" ? Object.values(value).filter(item => item instanceof File) : [];

/** Adds a field for each property, because a file cannot stand in JSON. */
function fill(body, value) {
  const names = Object.keys(value);
  if (names.includes("args") || (names.length === 1 && ["image", "text", "data"].includes(names[0]))) {
    throw new Error(
      `an image beside a property called ${names[0]} cannot be sent as a form; use another name in the model`,
    );
  }
  for (const [name, item] of Object.entries(value)) {
    const isPlain = item instanceof File || (name === "text" && typeof item === "string");
    body.append(name, isPlain ? item : new Blob([JSON.stringify(complete(item))], { type: "application/json" }));
  }
}

function readArgs(text) {
  const args = text.trim() ? parseJson(text) : {};
  if (typeof args !== "object" || args === null || Array.isArray(args))
    throw new Error('args must be a JSON object, such as {"top": 3}');
  return args;
}

const hasValue = value => value !== null && value !== undefined;

/** A schema of what a model without annotations declares: its only input, or a shape. */
function declared(inputs, inputShape) {
  if (inputs?.length === 1 && /^(bool|u?int\d+|float\d+)$/.test(inputs[0].dtype))
    return { type: "array", "x-dtype": inputs[0].dtype, "x-shape": inputs[0].shape };
  return inputShape ? { type: "array", "x-shape": inputShape } : {};
}

/** An array of zeros that fits. */
const sketch = data => ({
  $array: { dtype: data["x-dtype"], shape: (data["x-shape"] ?? [1]).map(size => (size < 0 ? 1 : size)) },
});

function kindOf(data, example) {
  if (isImage(example)) return "image";
  if (typeof example === "string" || (data.type === "string" && !hasValue(example))) return "text";
  if (hasValue(example) || (data.type && data.type !== "array")) return "json";
  if (isImageShape(data["x-shape"] ?? []) && ["uint8", undefined].includes(data["x-dtype"])) return "image";
  return data.type ? "json" : "text";
}
