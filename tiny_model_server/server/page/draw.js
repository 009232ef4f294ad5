// Draws what an answer holds: boxes, polygons, points and masks over the input image, other images, plots, tables.

import { h, svg } from "./dom.js";

const BOX = /box|polygon|contour|outline|corners/i;
const POINT = /point|landmark|keypoint|centers?$|centroid/i;
const MASK = /mask|segment/i;
const LABEL = /^(label|class|class_name|name|text|category)s?$/i;
const SCORE = /^(score|confidence|probability|prob|conf)s?$/i;
const MIN_PLOTTED = 16;
const MOST_ROWS = 100;
const MOST_COLUMNS = 12;
const MOST_SHAPES = 1000;
const MOST_PLOTS = 8;
const MOST_LINES = 8;
const MOST_TABLES = 8;
const COLOURS = ["#ff3b30", "#0a84ff", "#30d158", "#ff9f0a", "#bf5af2", "#64d2ff", "#ffd60a", "#ff375f"];

/** The elements to show of an answer; `file` is the input image, if there was one. */
export function drawings(value, file) {
  const found = { outlines: [], points: [], masks: [], images: [], plots: [], tables: [] };
  walk(value, "", found);
  const shown = [];
  if (file) shown.push(figure(file, found));
  for (const { png, name } of [...found.masks, ...found.images])
    shown.push(h("figure", {}, h("img", { src: png, alt: name }), name ? h("figcaption", {}, name) : null));
  for (const one of found.plots.slice(0, MOST_PLOTS)) shown.push(plot(one));
  shown.push(...found.tables.slice(0, MOST_TABLES).map(table));
  return shown;
}

const isNumbers = value => Array.isArray(value) && value.length > 0 && value.every(Number.isFinite);
const isObject = value => Boolean(value) && typeof value === "object" && !Array.isArray(value);
const isFacts = value => isObject(value) && typeof value.array === "string";
const isScalar = value => value === null || typeof value !== "object";
const list = value => (isFacts(value) ? value.values : value); // a large array comes with facts beside its values
const isImageUrl = text => typeof text === "string" && text.startsWith("data:image/png;base64,");

function walk(value, key, found) {
  if (BOX.test(key) && outline(list(value), {}, key, found)) return;
  if (POINT.test(key) && points(list(value), found)) return;
  if (isFacts(value)) facts(value, key, found);
  else if (Array.isArray(value)) array(value, key, found);
  else if (isObject(value)) object(value, found);
}

function facts(value, key, found) {
  if (isImageUrl(value.png)) {
    const isFlat = /^\S+ \d+x\d+$/.test(value.array);
    (MASK.test(key) || (isFlat && /^(bool|uint8) /.test(value.array)) ? found.masks : found.images).push({
      ...value,
      name: key,
    });
  } else if (isNumbers(value.values)) found.plots.push({ rows: [value.values], name: key, note: value.array });
}

function array(value, key, found) {
  if (isNumbers(value)) {
    if (value.length >= MIN_PLOTTED) found.plots.push({ rows: [value], name: key, note: `${value.length} numbers` });
  } else if (value.every(isNumbers)) {
    const rows = value.filter(row => row.length >= MIN_PLOTTED);
    if (rows.length) found.plots.push({ rows, name: key, note: `${rows.length} rows of ${rows[0].length}` });
  } else {
    if (value.length && value.every(isObject) && !value.some(isFacts)) found.tables.push({ rows: value, name: key });
    for (const item of value.slice(0, MOST_SHAPES)) walk(item, key, found);
  }
}

function object(value, found) {
  const entries = Object.entries(value);
  const of = pattern => entries.find(([key]) => pattern.test(key))?.[1];
  const labels = list(of(LABEL));
  const scores = list(of(SCORE));
  for (const [key, item] of entries) {
    if (!(BOX.test(key) && outline(list(item), { labels, scores }, key, found))) walk(item, key, found);
  }
  const columns = entries
    .map(([key, item]) => [key, list(item)])
    .filter(([, item]) => Array.isArray(item) && item.length > 1 && item.length < MIN_PLOTTED * 8 && !isWide(item));
  const length = columns[0]?.[1].length;
  if (columns.length > 1 && columns.every(([, item]) => item.length === length)) {
    found.tables.push({
      rows: columns[0][1].map((_, index) => Object.fromEntries(columns.map(([key, item]) => [key, item[index]]))),
      name: "",
    });
  }
}

const isWide = item => item.some(one => Array.isArray(one) && one.length > 4);

/** Adds [x0, y0, x1, y1], [[x, y], ...] or a list of such. False if it is none of them. */
function outline(value, { labels, scores }, key, found) {
  if (!Array.isArray(value) || !value.length) return false;
  const label = index =>
    [Array.isArray(labels) ? labels[index] : labels, rounded(Array.isArray(scores) ? scores[index] : scores)]
      .filter(isShown)
      .join(" ");
  const shapes = [asOutline(value, key)].filter(Boolean);
  if (shapes.length) return Boolean(found.outlines.push({ points: shapes[0], label: label(0) }));
  const several = value.slice(0, MOST_SHAPES).map(one => asOutline(list(one), key));
  if (!several.every(Boolean)) return false;
  several.forEach((points, index) => found.outlines.push({ points, label: label(index) }));
  return true;
}

const isShown = text => text !== undefined && text !== null && text !== "" && typeof text !== "object";
const rounded = value => (typeof value === "number" ? Number(value.toPrecision(3)) : value);

function asOutline(value, key) {
  if (isNumbers(value) && value.length >= 4 && value.length <= 6) {
    const [x, y, c, d] = value;
    const [x1, y1] = /xywh/i.test(key) ? [x + c, y + d] : [c, d];
    return [
      [x, y],
      [x1, y],
      [x1, y1],
      [x, y1],
    ];
  }
  return Array.isArray(value) && value.length > 2 && value.every(point => isNumbers(point) && point.length === 2)
    ? value
    : null;
}

function points(value, found) {
  if (!Array.isArray(value) || !value.length) return false;
  const all = isNumbers(value) && value.length === 2 ? [value] : value;
  if (!all.every(point => isNumbers(point) && (point.length === 2 || point.length === 3))) return false;
  found.points.push(...all.slice(0, MOST_SHAPES));
  return true;
}

/** The input image with everything over it that has places in it. */
function figure(file, found) {
  const [outlines, points] = [found.outlines.slice(0, MOST_SHAPES), found.points.slice(0, MOST_SHAPES)];
  const image = h("img", { alt: "The input" });
  const frame = h("div", { class: "over" }, image);
  image.addEventListener(
    "load",
    () => {
      const { naturalWidth: width, naturalHeight: height } = image;
      image.classList.toggle("tiny", width < 64);
      for (const mask of found.masks)
        overlay(mask, width, height).then(canvas => {
          if (canvas) image.after(canvas);
        });
      if (outlines.length || points.length) frame.append(shapes(outlines, points, width, height));
      URL.revokeObjectURL(image.src);
    },
    { once: true },
  );
  image.src = URL.createObjectURL(file);
  return h("figure", { class: "preview" }, frame);
}

function shapes(outlines, points, width, height) {
  const placing = all => {
    const numbers = all.flatMap(([x, y]) => [x, y]);
    // of width and height, not pixels
    const areParts = numbers.every(number => number >= 0 && number <= 1) && numbers.some(number => number % 1);
    return ([x, y]) => (areParts ? [x * width, y * height] : [x, y]);
  };
  const place = placing(outlines.flatMap(one => one.points));
  const size = Math.max(width, height) / 36;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "What the model found" });
  const labels = [...new Set(outlines.map(one => one.label.split(" ")[0]))];
  for (const { points: corners, label } of outlines) {
    const placed = corners.map(place);
    const colour = COLOURS[labels.indexOf(label.split(" ")[0]) % COLOURS.length];
    drawing.append(svg("polygon", { points: placed.map(point => point.join(",")).join(" "), stroke: colour }));
    if (label) drawing.append(caption(placed, label, size, width));
  }
  for (const [cx, cy] of points.map(placing(points)))
    drawing.append(svg("circle", { cx, cy, r: Math.max(1, size / 5) }));
  return drawing;
}

/** The label above a shape; it ends at its right side where the image ends soon. */
function caption(corners, label, size, width) {
  const xs = corners.map(([x]) => x);
  const top = Math.min(...corners.map(([, y]) => y));
  const isRight = Math.min(...xs) > 0.75 * width;
  const place = isRight
    ? { x: Math.min(width, Math.max(...xs)), "text-anchor": "end" }
    : { x: Math.max(0, Math.min(...xs)) };
  return svg("text", { ...place, y: Math.max(size, top - size / 4), "font-size": size }, label.slice(0, 60));
}

/** A mask as colours over the image; null if it has another size. */
async function overlay({ png, max }, width, height) {
  const image = new Image();
  image.src = png;
  await image.decode();
  if (image.naturalWidth !== width || image.naturalHeight !== height) return null;
  const canvas = h("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  const areClasses = max > 1 && max <= 64;
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = pixels.data[at];
    const colour = COLOURS[areClasses ? value % COLOURS.length : 0];
    for (let channel = 0; channel < 3; channel++)
      pixels.data[at + channel] = parseInt(colour.slice(1 + 2 * channel, 3 + 2 * channel), 16);
    pixels.data[at + 3] = areClasses ? (value ? 140 : 0) : max === 1 ? 140 * Math.sign(value) : 0.75 * value;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** One row of numbers, or a few, as lines. */
function plot({ rows, name, note }) {
  const shown = rows.slice(0, MOST_LINES);
  const all = shown.flat();
  const low = Math.min(...all);
  const high = Math.max(...all);
  const y = value => 99 - (98 * (value - low)) / (high - low || 1);
  const lines = shown.map((row, index) =>
    svg("polyline", {
      points: row.map((value, at) => `${(400 * at) / Math.max(1, row.length - 1)},${y(value).toFixed(2)}`).join(" "),
      stroke: shown.length > 1 ? COLOURS[index] : "currentColor",
    }),
  );
  const zero = low < 0 && high > 0 ? [svg("line", { x1: 0, x2: 400, y1: y(0), y2: y(0), class: "zero" })] : [];
  return h(
    "figure",
    { class: "plot" },
    svg(
      "svg",
      {
        viewBox: "0 0 400 100",
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `Plot of ${name || "the numbers"}`,
      },
      ...zero,
      ...lines,
    ),
    h("figcaption", {}, [name, note, `${rounded(low)} to ${rounded(high)}`].filter(Boolean).join(" · ")),
  );
}

function table({ rows, name }) {
  const columns = [...new Set(rows.slice(0, MOST_ROWS).flatMap(Object.keys))].slice(0, MOST_COLUMNS);
  const cell = value => {
    const isNumber = typeof value === "number";
    const text =
      value === undefined
        ? ""
        : isNumber
          ? String(Number.isInteger(value) ? value : Number(value.toPrecision(4)))
          : isScalar(value)
            ? String(value)
            : short(value);
    return h(
      "td",
      {
        class: isNumber ? "number" : isScalar(value) ? null : "nested",
        title: text.length > 40 ? text.slice(0, 500) : null,
      },
      text.length > 200 ? `${text.slice(0, 200)}…` : text,
    );
  };
  const body = rows.slice(0, MOST_ROWS).map(row => h("tr", {}, ...columns.map(column => cell(row[column]))));
  const note = rows.length > MOST_ROWS ? `the first ${MOST_ROWS} of ${rows.length} rows` : "";
  return h(
    "figure",
    { class: "table" },
    h(
      "div",
      { class: "scroll", tabindex: "0" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ...columns.map(column =>
              h(
                "th",
                { scope: "col", class: rows.every(row => typeof row[column] === "number") ? "number" : null },
                column,
              ),
            ),
          ),
        ),
        h("tbody", {}, ...body),
      ),
    ),
    name || note ? h("figcaption", {}, [name, note].filter(Boolean).join(" · ")) : null,
  );
}

/** A nested value in a cell. */
function short(value) {
  if (isFacts(value)) return value.array;
  const text = JSON.stringify(value, (_, item) =>
    typeof item === "number" ? Number(item.toPrecision(4)) : isFacts(item) ? item.array : item,
  );
  return text.length > 48 ? `${text.slice(0, 47)}…` : text;
}
