// The list of models, the address bar, the keyboard, and the poll that keeps all of it current.

import { askForToken, Failure, getJson } from "./api.js";
import { figure, History, POLL_MS, sparkline } from "./charts.js";
import { $, h, setText } from "./dom.js";
import { ModelView } from "./model.js";

const wide = matchMedia("(min-width: 48rem)");
const rows = new Map(); // by the name of the model
const views = new Map();
const histories = new Map();
let server = { models: [] };
let described = new Map();
let signature = "";
let chosen = null;
let state = "all";
let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return; // goes on as soon as somebody looks
  try {
    server = await getJson("stats");
    const now = performance.now();
    const found = JSON.stringify(server.models.map(({ name, state, worker_pids }) => [name, state, worker_pids]));
    for (const model of server.models) history(model.name).add(now, model);
    if (found !== signature) {
      described = new Map((await getJson("models")).models.map(model => [model.name, model]));
      signature = found;
    }
    notice("");
    show();
  } catch (error) {
    notice(error instanceof Failure && error.code ? error.words : "The server does not answer. Trying again…");
    if (!(error instanceof Failure)) console.error(error);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MS);
}

const history = name => histories.get(name) ?? histories.set(name, new History()).get(name);

function notice(text) {
  $("notice").hidden = !text;
  setText($("notice"), text);
}

function show() {
  const ready = server.models.filter(model => model.state === "READY").length;
  setText($("summary"), `${ready} of ${server.models.length} ready`);
  showStates();
  showList();
  showModel();
}

// ---- the list

function showStates() {
  const counts = new Map([["all", server.models.length]]);
  for (const model of server.models) counts.set(model.state, (counts.get(model.state) ?? 0) + 1);
  if (!counts.has(state)) state = "all";
  const buttons = [...counts].map(([name, count]) => `${name}\n${count}`).join("\n") + state;
  if ($("states").dataset.shown === buttons) return;
  $("states").dataset.shown = buttons;
  $("states").hidden = counts.size < 3; // all of them have one state
  const focused = document.activeElement?.dataset.state;
  $("states").replaceChildren(
    ...[...counts].map(([name, count]) =>
      h(
        "button",
        {
          type: "button",
          class: "chip",
          "data-state": name,
          "aria-pressed": String(name === state),
          click: () => {
            state = name;
            showStates();
            showList();
          },
        },
        `${name === "all" ? "All" : name} ${count}`,
      ),
    ),
  );
  if (focused) $("states").querySelector(`[data-state="${focused}"]`)?.focus();
}

function showList() {
  const wanted = $("filter").value.trim().toLowerCase();
  const models = server.models.filter(
    model => model.name.toLowerCase().includes(wanted) && (state === "all" || model.state === state),
  );
  const items = models.map(model => {
    const row = rows.get(model.name) ?? rows.set(model.name, makeRow(model.name)).get(model.name);
    row.update(model);
    return row.element;
  });
  const list = $("models");
  if (items.length !== list.children.length || items.some((item, index) => item !== list.children[index]))
    list.replaceChildren(...items);
  $("none").hidden = items.length > 0;
  setText($("none"), server.models.length ? "No model fits the filter." : "There is no model folder yet.");
}

function makeRow(name) {
  const dot = h("span", { class: "dot", "aria-hidden": "true" });
  const rate = h("span", { class: "rate" });
  const about = h("span", { class: "about" });
  const busy = h("span", { class: "busy", hidden: true }, "running");
  const spark = sparkline(56, 18);
  const link = h(
    "a",
    { href: `#/models/${encodeURIComponent(name)}`, "data-name": name },
    dot,
    h("span", { class: "name" }, name),
    busy,
    rate,
    about,
    spark.element,
  );
  return {
    element: h("li", {}, link),
    update: model => {
      const past = history(name);
      const { rate: now, p95, failed } = past.last ?? {};
      link.dataset.state = model.state;
      if (name === chosen) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      busy.hidden = !views.get(name)?.running;
      rate.hidden = !busy.hidden;
      setText(rate, now ? `${figure(now, 1)}/s` : "");
      const facts = [
        model.state,
        failed ? `${figure(failed, 1)} failed/s` : "",
        p95 ? `p95 ${figure(p95)} ms` : "",
        model.queue_depth ? `queue ${model.queue_depth}` : "",
      ];
      setText(about, model.reason ? `${model.state}: ${model.reason}` : facts.filter(Boolean).join(" · "));
      spark.draw(past.points.some(point => point.rate) ? past.points : [], "rate", past.last?.now ?? 0);
    },
  };
}

const links = () => [...$("models").querySelectorAll("a")];

function moveInList(event) {
  const all = links();
  const at = all.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to < 0) $("filter").focus();
  else all[to]?.focus();
}

$("list").addEventListener("keydown", event => {
  if (event.target.closest("#models")) moveInList(event);
});
$("filter").addEventListener("input", showList);
$("filter").addEventListener("keydown", event => {
  if (event.key === "ArrowDown") {
    event.preventDefault();
    links()[0]?.focus();
  }
  if (event.key === "Enter") links()[0]?.click();
});
addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, textarea, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    if (!wide.matches && chosen) location.hash = "#/";
    $("filter").focus();
  } else if (event.key === "Escape") escape();
});

function escape() {
  if (document.activeElement === $("filter")) {
    $("filter").value = "";
    showList();
  }
  if (!wide.matches && chosen) location.hash = "#/";
  else (rows.get(chosen)?.element.firstChild ?? links()[0])?.focus();
}

// ---- the chosen model

/** The model that the address names; null for the list alone, which a wide screen shows beside the first model. */
function named() {
  const found = /^#\/models\/(.+)$/.exec(location.hash)?.[1];
  try {
    return found ? decodeURIComponent(found) : null;
  } catch {
    return found;
  }
}

function route() {
  const before = chosen;
  chosen = named();
  if (!chosen && wide.matches && server.models.length) {
    const first = server.models.find(model => model.state === "READY") ?? server.models[0];
    window.history.replaceState(null, "", `#/models/${encodeURIComponent(first.name)}`);
    chosen = first.name;
  }
  document.body.classList.toggle("chosen", Boolean(chosen));
  document.title = chosen ? `${chosen} · Tiny Model Server` : "Tiny Model Server";
  return before !== chosen;
}

function showModel() {
  const changed = route();
  const facts = described.get(chosen);
  const numbers = server.models.find(model => model.name === chosen);
  const panel = $("model");
  if (!facts || !numbers) {
    const text = chosen && server.models.length ? `There is no model ${chosen}.` : "";
    panel.replaceChildren(h("p", { class: "muted empty" }, text));
    return;
  }
  const view = views.get(chosen) ?? views.set(chosen, new ModelView(chosen, poll)).get(chosen);
  if (panel.firstChild !== view.element) panel.replaceChildren(view.element);
  view.update(facts, numbers, history(chosen).points, server);
  if (!changed) return;
  showList();
  if (wide.matches) rows.get(chosen)?.element.scrollIntoView({ block: "nearest" });
  panel.scrollTop = 0;
  if (!wide.matches) {
    scrollTo(0, 0);
    view.focus();
  }
}

addEventListener("hashchange", () => {
  if (server.models.length) showModel();
});
wide.addEventListener("change", () => {
  if (server.models.length) show();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
for (const button of document.querySelectorAll("[data-close]"))
  button.addEventListener("click", () => button.closest("dialog").close());
$("use-token").addEventListener("click", async () => {
  if (await askForToken()) poll();
});
addEventListener("paste", event => views.get(chosen)?.paste(event));
poll();
