// The answers to one input, as they come.

import { drawings } from "./draw.js";
import { copyButton, h } from "./dom.js";
import { files } from "./input.js";
import { json } from "./json.js";

const KEPT = 200; // values of a stream that stay

/** Where the answers of a model appear. */
export class Answer {
  constructor() {
    this.status = h("p", { class: "status muted", role: "status" }, "Run the model to see its answer.");
    this.drawn = h("div", { class: "drawn" });
    this.values = h("div", { class: "values" });
    this.copy = copyButton(() => this.run?.text ?? "");
    this.copy.hidden = true;
    this.element = h(
      "section",
      { class: "panel answer", "aria-label": "Answer" },
      h("div", { class: "row" }, h("h3", {}, "Answer"), this.status, this.copy),
      this.drawn,
      this.values,
    );
  }

  /** Begins the answer to an input; what an older call still brings is dropped. */
  begin(input = null) {
    this.run = new Run(this, input);
    return this.run;
  }
}

class Run {
  constructor(place, input) {
    this.place = place;
    this.file = input?.kind === "image" ? input.value : files(input?.value)[0];
    this.count = 0;
    this.pieces = [];
    this.isText = true;
    this.show("running…");
    place.drawn.replaceChildren();
    place.values.replaceChildren();
    place.copy.hidden = true;
  }

  get isCurrent() {
    return this.place.run === this;
  }

  get text() {
    return this.count > 1 && this.isText
      ? this.pieces.join("")
      : this.pieces.map(value => JSON.stringify(value)).join("\n");
  }

  add(value, ms) {
    if (!this.isCurrent) return;
    this.count++;
    this.isText &&= typeof value === "string";
    this.pieces.push(value);
    if (this.pieces.length > KEPT && !this.isText) this.pieces.splice(0, 1);
    this.show(`${this.count} ${this.count > 1 ? "values" : "value"} in ${time(ms)}…`);
    if (this.count > 1 && this.isText) this.addText(value);
    else this.addValue(value);
  }

  addText(piece) {
    if (this.count === 2) this.place.values.replaceChildren(h("pre", { class: "stream" }, this.pieces[0]));
    this.place.values.firstChild.append(piece);
  }

  addValue(value) {
    const { values, drawn } = this.place;
    values.append(json(withoutImages(value)));
    if (values.children.length > KEPT) values.firstChild.remove();
    drawn.replaceChildren(...drawings(value, this.file));
  }

  end(ms) {
    if (!this.isCurrent) return;
    this.show(this.count > 1 ? `${this.count} values in ${time(ms)}` : `answered in ${time(ms)}`);
    this.place.copy.hidden = !this.count;
  }

  fail(text) {
    if (!this.isCurrent) return;
    this.show(text, true);
    this.place.copy.hidden = !this.count;
  }

  show(text, isError = false) {
    this.place.status.textContent = text;
    this.place.status.classList.toggle("error", isError);
    this.place.status.classList.toggle("muted", !isError);
  }
}

const time = ms => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** The value without the images in it, which are drawn. */
function withoutImages(value) {
  if (Array.isArray(value)) return value.map(withoutImages);
  if (!value || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([key, item]) => !(key === "png" && typeof item === "string" && value.array))
      .map(([key, item]) => [key, withoutImages(item)]),
  );
}
