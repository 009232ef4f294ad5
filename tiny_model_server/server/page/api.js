// Calls the server: with the token, errors in words, and answers that come in parts.

import { $, open } from "./dom.js";

const KEY = "tiny-model-server-token";
let token = sessionStorage.getItem(KEY) ?? "";
let question = null; // one dialog for all calls that wait for a token
let declined = false;

/** What went wrong, in words; `code` is the HTTP status, 0 if there was no answer. */
export class Failure extends Error {
  constructor(message, response = null, status = "") {
    super(message);
    this.code = response?.ok ? 0 : (response?.status ?? 0);
    this.status = status;
    this.request = response?.headers.get("x-request-id") ?? "";
  }

  get words() {
    const where = [this.code || "", this.status].filter(Boolean).join(" ");
    const isInLog = this.request && (this.code >= 500 || this.status === "INTERNAL");
    return `${where}${where ? ": " : ""}${this.message}${isInLog ? ` (request ${this.request})` : ""}`;
  }
}

export const hasToken = () => Boolean(token);

/** Asks for a token, and keeps it until the tab is closed. False if none was given. */
export async function askForToken(error = "") {
  $("token-error").textContent = error;
  $("token").value = "";
  const given = (await open($("ask-token"))) && $("token").value;
  declined = !given;
  if (given) sessionStorage.setItem(KEY, (token = given));
  return Boolean(given);
}

/** The response to a request; a Failure if it is none of success. Asks for the token if the server does. */
export async function call(path, options = {}) {
  for (;;) {
    const used = token;
    const response = await send(path, options);
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (response.status !== 401 || declined) throw failure;
    if (used !== token) continue; // another call has asked meanwhile
    question ??= askForToken(used ? "The server does not accept this token." : "").finally(() => {
      question = null;
    });
    if (!(await question)) throw failure;
  }
}

async function send(path, options) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server does not answer");
  }
}

async function failureOf(response) {
  const text = await response.text();
  try {
    const { error, status } = JSON.parse(text);
    return new Failure(String(error), response, status);
  } catch {
    return new Failure(text.slice(0, 300) || response.statusText, response);
  }
}

export const getJson = async path => (await call(path)).json();

export const post = (name, action, options = {}) =>
  call(`models/${encodeURIComponent(name)}/${action}`, { method: "POST", ...options });

/** The values of a model's answer as they come: one, or each that a stream has. */
export async function* values(response) {
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    yield (await response.json()).answer;
    return;
  }
  for await (const { event, data } of events(response.body)) {
    if (event === "end") return;
    if (event === "error") throw new Failure(data.error, response, data.status);
    yield data;
  }
  throw new Failure("the answer ended before its last part");
}

async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const parts = text.split("\n\n");
      text = parts.pop();
      yield* parts.map(parse).filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(part) {
  const fields = part
    .split("\n")
    .map(line => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]);
  const data = fields
    .filter(([name]) => name === "data")
    .map(([, value]) => value)
    .join("\n");
  return data && { event: fields.find(([name]) => name === "event")?.[1] ?? "message", data: JSON.parse(data) };
}
