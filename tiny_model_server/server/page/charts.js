// The numbers of the last minutes, and small charts of them.

import { h, setText, svg } from "./dom.js";

export const POLL_MS = 2000;
const KEPT_MS = 5 * 60_000;
const SHORTEST_MS = 60_000; // that a chart shows
const WINDOW_MS = 10_000; // rates are of so long

const CHARTS = [
  { key: "rate", name: "Rate", unit: "/s", digits: 1 },
  { key: "p50", name: "p50", unit: " ms" },
  { key: "p95", name: "p95", unit: " ms" },
  { key: "queue", name: "Queue", unit: "", digits: 0 },
  { key: "batch", name: "Batch", unit: "", digits: 1 },
];

/** What one model did since the page was opened, five minutes at most. */
export class History {
  constructor() {
    this.samples = [];
    this.points = [];
  }

  add(now, numbers) {
    if (this.samples.at(-1)?.numbers.answered > numbers.answered) this.samples = []; // the server has begun anew
    this.samples.push({ now, numbers });
    const before = this.samples.findLast(sample => sample.now <= now - WINDOW_MS) ?? this.samples[0];
    this.points.push({ now, ...measures(before, { now, numbers }) });
    this.samples = this.samples.filter(one => one.now >= now - 2 * WINDOW_MS);
    this.points = this.points.filter(one => one.now >= now - KEPT_MS);
  }

  get last() {
    return this.points.at(-1);
  }
}

function measures(before, after) {
  const grown = key => after.numbers[key] - before.numbers[key];
  const seconds = after.now > before.now ? Math.max(POLL_MS, after.now - before.now) / 1000 : 0;
  return {
    rate: seconds ? grown("answered") / seconds : null,
    failed: seconds ? grown("failed") / seconds : null,
    p50: after.numbers.p50_ms,
    p95: after.numbers.p95_ms,
    queue: after.numbers.queue_depth,
    batch: grown("batches") ? grown("items") / grown("batches") : null,
  };
}

export function figure(value, digits) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString(
    "en",
    digits === undefined
      ? { maximumSignificantDigits: value < 1000 ? 3 : 4, useGrouping: false }
      : { maximumFractionDigits: digits, minimumFractionDigits: value < 100 ? digits : 0, useGrouping: false },
  );
}

/** How long ago a chart begins. */
const span = points => Math.max(SHORTEST_MS, points.length ? points.at(-1).now - points[0].now : 0);

/** The path of a line, broken where there is no value, and its largest value. */
function line(points, key, now, width, height) {
  const most = Math.max(...points.map(point => point[key] ?? 0), key === "queue" || key === "batch" ? 1 : 0.001);
  const shown = span(points);
  let path = "";
  let broken = true;
  for (const point of points) {
    const value = point[key];
    if (value === null || value === undefined) {
      broken = true;
      continue;
    }
    const x = width * (1 - (now - point.now) / shown);
    const y = height - 1 - ((height - 3) * value) / most;
    path += `${broken ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    if (broken) path += "h.01"; // a value alone is a dot
    broken = false;
  }
  return { path, most };
}

export function sparkline(width, height) {
  const path = svg("path", { class: "line" });
  const element = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    path,
  );
  return {
    element,
    draw: (points, key, now) => {
      const found = line(points, key, now, width, height);
      path.setAttribute("d", found.path);
      return found.most;
    },
  };
}

/** The row of charts of a model. */
export class Charts {
  constructor() {
    this.cards = CHARTS.map(chart => this.card(chart));
    this.element = h("dl", { class: "charts" }, ...this.cards.map(card => card.element));
    this.points = [];
  }

  card(chart) {
    const value = h("dd");
    const note = h("span", { class: "muted" });
    const spark = sparkline(160, 30);
    const element = h(
      "div",
      {
        class: "chart",
        "data-chart": chart.key,
        pointermove: event => this.show(chart, value, note, event),
        pointerleave: () => this.draw(),
      },
      h("dt", {}, chart.name, note),
      value,
      spark.element,
    );
    return { ...chart, element, value, note, spark };
  }

  show({ key, unit, digits }, value, note, event) {
    const box = event.currentTarget.getBoundingClientRect();
    const now = this.points.at(-1)?.now;
    const wanted = now - span(this.points) * (1 - (event.clientX - box.left) / box.width);
    const near = this.points.reduce(
      (best, one) => (Math.abs(one.now - wanted) < Math.abs((best ?? one).now - wanted) ? one : (best ?? one)),
      null,
    );
    if (!near) return;
    value.textContent = figure(near[key], digits) + (near[key] === null ? "" : unit);
    note.textContent = `${Math.round((now - near.now) / 1000)} s ago`;
  }

  update(points) {
    this.points = points;
    if (!this.element.matches(":hover")) this.draw();
  }

  draw() {
    const now = this.points.at(-1)?.now ?? 0;
    const last = this.points.at(-1) ?? {};
    for (const { key, unit, digits, value, note, spark } of this.cards) {
      const most = spark.draw(this.points, key, now);
      const known = last[key] !== null && last[key] !== undefined;
      setText(value, figure(last[key], digits) + (known ? unit : ""));
      const failed = key === "rate" && last.failed ? `${figure(last.failed, 1)} failed/s` : "";
      setText(note, failed || (this.points.some(point => point[key]) ? `max ${figure(most, digits)}` : ""));
      note.classList.toggle("error", Boolean(failed));
    }
  }
}
