// JSON for reading: short values on one line, long lists and texts folded.

import { h } from "./dom.js";

const WIDTH = 76;
const FOLD_OVER = 24; // items of a list
const SHOWN = 8; // of a folded one
const LONG_TEXT = 400;
const MOST_ITEMS = 2000; // that one unfolding shows

/** A <pre> with the value. */
export const json = value => h("pre", { class: "code json", tabindex: "0" }, ...parts(value, ""));

function parts(value, indent) {
  if (typeof value === "string" && value.length > LONG_TEXT) return longText(value);
  if (value === null || typeof value !== "object") return [JSON.stringify(value)];
  const entries = Array.isArray(value)
    ? value.map(item => ["", item])
    : Object.entries(value).map(([key, item]) => [`${JSON.stringify(key)}: `, item]);
  const [left, right] = Array.isArray(value) ? "[]" : "{}";
  const line = oneLine(value, WIDTH - indent.length);
  if (line !== null && entries.length <= FOLD_OVER) return [line];
  const isRow = Array.isArray(value) && value.every(item => item === null || typeof item !== "object");
  const inner = isRow ? "" : `${indent}  `;
  const between = isRow ? ", " : `,\n${inner}`;
  const show = some => some.flatMap(([key, item], index) => [index ? between : "", key, ...parts(item, inner)]);
  const begin = isRow ? left : `${left}\n${inner}`;
  const end = isRow ? right : `\n${indent}${right}`;
  if (entries.length <= FOLD_OVER) return [begin, ...show(entries), end];
  return [begin, ...show(entries.slice(0, SHOWN)), between, fold(entries.slice(SHOWN), show, between), end];
}

/** What is left of a line behind a value; negative if it does not fit, which is found out early. */
function room(value, width) {
  if (value === null || typeof value !== "object")
    return width - (typeof value === "string" && value.length > width ? value.length : JSON.stringify(value).length);
  for (const [key, item] of Object.entries(value)) {
    width = room(item, width - (Array.isArray(value) ? 2 : key.length + 6));
    if (width < 0) return width;
  }
  return width;
}

/** The value on one line, or null if it is longer than that. */
function oneLine(value, width) {
  return room(value, width) < 0
    ? null
    : JSON.stringify(value, null, 1)
        .replace(/\n\s*/g, " ")
        .replace(/([[{]) | ([\]}])/g, "$1$2");
}

function fold(entries, show, between) {
  const button = h(
    "button",
    {
      type: "button",
      class: "fold",
      click: () => {
        const rest = entries.slice(MOST_ITEMS);
        const shown = show(entries.slice(0, MOST_ITEMS));
        button.replaceWith(...shown, ...(rest.length ? [between, fold(rest, show, between)] : []));
      },
    },
    `… ${entries.length} more`,
  );
  return button;
}

function longText(text) {
  const rest = JSON.stringify(text.slice(LONG_TEXT)).slice(1);
  const button = h(
    "button",
    { type: "button", class: "fold", click: () => button.replaceWith(rest) },
    `… ${text.length - LONG_TEXT} more characters`,
  );
  return [JSON.stringify(text.slice(0, LONG_TEXT)).slice(0, -1), button];
}
