// One model: its state, its charts, an input, the answers to it, a snippet and its log. Each model has a view of its
// own, which a call that takes long writes into, whatever is shown meanwhile.

import { Answer } from "./answer.js";
import { Failure, getJson, post, values } from "./api.js";
import { Charts } from "./charts.js";
import { confirm, copyButton, h, setText } from "./dom.js";
import { Input } from "./input.js";
import { LANGUAGES, snippet } from "./snippets.js";

const CHANGES = { load: "Load", reload: "Reload", unload: "Unload" };
const LOG_MS = 3000;

export class ModelView {
  constructor(name, changed) {
    this.name = name;
    this.changed = changed;
    this.running = null; // what ends the call that is under way
    this.streams = false;
    this.charts = new Charts();
    this.input = new Input(() => this.showSnippet());
    this.answer = new Answer();
    this.build();
  }

  build() {
    this.title = h("h2", { tabindex: "-1" }, this.name);
    this.state = h("span", { class: "state" });
    this.about = h("p", { class: "about muted" });
    this.reason = h("pre", { class: "reason error", hidden: true });
    this.outcome = h("span", { role: "status", class: "outcome" });
    this.buttons = Object.entries(CHANGES).map(([action, text]) =>
      h("button", { type: "button", class: "quiet", "data-action": action, click: () => this.change(action) }, text),
    );
    this.runButton = h("button", { class: "main run" }, "Run");
    this.cancelButton = h(
      "button",
      { type: "button", class: "cancel", hidden: true, click: () => this.running?.abort() },
      "Cancel",
    );
    const form = h(
      "form",
      {
        class: "panel input",
        "aria-label": "Input",
        submit: event => {
          event.preventDefault();
          this.run();
        },
        keydown: event => {
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
            event.preventDefault();
            this.run();
          }
        },
      },
      this.input.element,
      h("div", { class: "row" }, this.runButton, this.cancelButton, h("span", { class: "muted hint" }, "Ctrl+Enter")),
    );
    this.element = h(
      "article",
      { "data-model": this.name },
      h("a", { href: "#/", class: "back" }, "‹ Models"),
      h("header", {}, this.title, this.state, h("div", { class: "row actions" }, this.outcome, ...this.buttons)),
      this.about,
      this.reason,
      this.charts.element,
      h("div", { class: "work" }, form, this.answer.element),
      this.buildSnippet(),
      this.buildLog(),
    );
  }

  buildSnippet() {
    this.code = h("pre", { class: "code", tabindex: "0" });
    this.language = "python";
    this.tabs = Object.entries(LANGUAGES).map(([key, text]) =>
      h(
        "button",
        {
          type: "button",
          class: "chip",
          "data-language": key,
          "aria-pressed": String(key === this.language),
          click: () => {
            this.language = key;
            this.showSnippet();
          },
        },
        text,
      ),
    );
    return h(
      "section",
      { class: "panel snippet", "aria-label": "The same call from code" },
      h(
        "div",
        { class: "row" },
        h("h3", {}, "The same call"),
        ...this.tabs,
        copyButton(() => this.code.textContent),
      ),
      this.code,
    );
  }

  buildLog() {
    this.lines = h("pre", { class: "code", tabindex: "0" });
    this.log = h("details", { class: "panel log", toggle: () => this.showLog() }, h("summary", {}, "Log"), this.lines);
    return this.log;
  }

  /** Shows what the server knows of the model now. */
  update(facts, numbers, points, server) {
    const isNew = this.facts !== facts;
    [this.facts, this.server] = [facts, server];
    this.charts.update(points);
    setText(this.state, numbers.state);
    this.state.dataset.state = numbers.state;
    this.reason.hidden = !numbers.reason;
    setText(this.reason, numbers.reason);
    setText(this.about, describe(facts, numbers));
    for (const button of this.buttons)
      button.hidden = (button.dataset.action === "load") === (numbers.state === "READY");
    if (!isNew) return;
    this.input.prefill(facts);
    this.showSnippet();
    this.showLog();
  }

  focus() {
    this.title.focus({ preventScroll: true });
  }

  paste(event) {
    this.input.paste(event);
  }

  async change(action) {
    const text = "Calls to it are refused until it is loaded again. Calls in work finish first.";
    if (action === "unload" && !(await confirm(`Unload ${this.name}?`, text, "Unload"))) return;
    this.report(`${CHANGES[action]}ing…`);
    this.busy(true);
    try {
      const model = await (await post(this.name, action)).json();
      this.report(action === "reload" ? "Reloaded" : model.state);
    } catch (error) {
      this.report(error instanceof Failure ? error.words : String(error), true);
    }
    this.busy(false);
    this.changed();
  }

  busy(busy) {
    for (const button of this.buttons) button.disabled = busy;
  }

  report(text, isError = false) {
    this.outcome.classList.toggle("error", isError);
    this.outcome.textContent = text;
  }

  /** Runs the model once; what came before is ended. */
  async run() {
    this.running?.abort();
    let input;
    try {
      input = this.input.read();
    } catch (error) {
      return this.answer.begin().fail(error.message);
    }
    const running = (this.running = new AbortController());
    const answer = this.answer.begin(input);
    const since = performance.now();
    this.cancelButton.hidden = false;
    this.changed();
    try {
      const response = await post(this.name, "run?view", {
        body: input.body(),
        signal: running.signal,
        headers: { Accept: "text/event-stream" },
      });
      for await (const value of values(response)) answer.add(value, performance.now() - since);
      answer.end(performance.now() - since);
      this.streams = answer.count > 1;
    } catch (error) {
      answer.fail(running.signal.aborted ? "Cancelled" : (error.words ?? error.message));
    }
    if (this.running !== running) return; // another call has begun
    this.running = null;
    this.cancelButton.hidden = true;
    this.changed();
    this.showSnippet();
    this.showLog();
  }

  showSnippet() {
    if (!this.server) return;
    for (const tab of this.tabs) tab.setAttribute("aria-pressed", String(tab.dataset.language === this.language));
    let text;
    try {
      text = snippet(this.language, this.name, this.input.read(true), this.streams, this.server);
    } catch (error) {
      text = error.message;
    }
    setText(this.code, text);
  }

  /** Shows the last lines of the log, while it is open and seen. */
  async showLog() {
    clearTimeout(this.logTimer);
    if (!this.log.open || !this.element.isConnected || document.hidden) return;
    try {
      const { lines } = await getJson(`models/${encodeURIComponent(this.name)}/logs`);
      const atEnd = this.lines.scrollHeight - this.lines.scrollTop - this.lines.clientHeight < 8;
      setText(this.lines, lines.length ? lines.join("\n") : "Its workers have written nothing yet.");
      if (atEnd) this.lines.scrollTop = this.lines.scrollHeight;
    } catch (error) {
      setText(this.lines, error.words ?? String(error));
    }
    this.logTimer = setTimeout(() => this.showLog(), LOG_MS);
  }
}

function describe(facts, numbers) {
  const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  const parts = [
    String(facts.metadata.description ?? "").replace(/\.$/, ""),
    facts.input_shape && `takes ${facts.input_shape.join("x")}`,
    facts.stages.length ? `runs ${facts.stages.join(", then ")}` : many(numbers.worker_pids.length, "worker"),
    facts.max_batch_size > 1 && `batches of up to ${facts.max_batch_size}`,
    `${Math.round(100 * numbers.busy)} % busy`,
  ];
  if (numbers.state !== "READY") parts.length = 1;
  return parts.filter(Boolean).join(" · ");
}
