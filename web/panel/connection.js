// What the panel says to the server, and what it hears.

import { api } from "../../../scripts/api.js";

const ROOT = "/steadyvsr";
// The second one is what a page of another site cannot send.
const HEADERS = { "Content-Type": "application/json", "X-SteadyVSR": "1" };

/** GET or POST a route of the pack; an error carries the server's own words. */
async function call(route, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers: HEADERS };
  const response = await api.fetchApi(ROOT + route, options);
  const text = await response.text();
  let answer = {};
  try {
    answer = text ? JSON.parse(text) : {};
  } catch {
    // Not our route that answered, such as a proxy's error page.
  }
  if (!response.ok) throw new Error(answer.error ?? `${route}: the server answered ${response.status}`);
  return answer;
}

export const state = () => call("/state");
export const receipts = () => call("/receipts");
export const watch = (open) => call("/watch", { client: api.clientId ?? "", open });
export const free = (flags) => call("/free", flags);
export const release = (ids) => call("/release", ids ? { ids } : {});
export const policy = (id, value) => call("/policy", { id, policy: value });
export const offload = (handle) => call("/offload", { handle });
export const settings = (values) => call("/settings", values);
export const predict = (values) => call("/predict", values);

/** Listens until the returned function is called. */
export function listen(handlers) {
  for (const [name, handler] of Object.entries(handlers)) api.addEventListener(name, handler);
  return () => {
    for (const [name, handler] of Object.entries(handlers)) api.removeEventListener(name, handler);
  };
}
