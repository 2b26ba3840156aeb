// What came of every action: asked, measured, and what is still held by whom.

import { follow, make, say } from "./dom.js";
import { POLICIES, size } from "./format.js";

const SHOWN = 20;
const GOOD = new Set(["FREED", "DONE", "NOT_LOADED"]);

function receiptRow() {
  const title = make("span", { className: "svr-receipt-title" });
  const when = make("time", { className: "svr-number svr-quiet" });
  const line = make("div", { className: "svr-receipt-line" });
  const details = make("ul", { className: "svr-details" });
  const rows = new Map();
  const element = make("li", { className: "svr-receipt" }, make("div", { className: "svr-row" }, title, when), line, details);

  function update(receipt) {
    say(title, receipt.title);
    const moment = new Date(receipt.time * 1000);
    when.dateTime = moment.toISOString();
    say(when, moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" }));
    say(line, receipt.line);
    element.dataset.result = GOOD.has(receipt.verdict) ? "good" : receipt.verdict === "PENDING" ? "pending" : "bad";
    follow(details, rows, receipt.models ?? [], (model) => model.name + (model.id ?? ""), () => {
      const item = make("li", {});
      return { element: item, update: (model) => say(item, modelLine(model)) };
    });
  }

  return { element, update };
}

/** "WAN21 · kept · stayed with 6.10 GiB", "WanVAE · went, 0.48 GiB". */
function modelLine(model) {
  const state = model.stayed ? `stayed with ${size(model.after)}` : `went, ${size(model.before)}`;
  return [model.name, POLICIES[model.policy] ?? null, state].filter(Boolean).join(" · ");
}

export function receiptList() {
  const list = make("ol", { className: "svr-receipts", reversed: true });
  const empty = make("p", { className: "svr-quiet" }, "Receipts of what you ask for appear here, with measured bytes.");
  // Only the newest line is read out, and only once.
  const spoken = make("div", { className: "svr-spoken", aria: { live: "polite" } });
  const element = make("section", { className: "svr-card" }, make("h3", {}, "Receipts"), empty, list, spoken);
  const rows = new Map();
  let receipts = [];

  function show() {
    follow(list, rows, receipts, (receipt) => receipt.id, receiptRow);
    empty.hidden = receipts.length > 0;
  }

  return {
    element,
    /** Adds what the server remembers; what was pushed meanwhile stays. */
    merge(remembered) {
      const known = new Set(remembered.map(({ id }) => id));
      const all = [...receipts.filter(({ id }) => !known.has(id)), ...remembered];
      receipts = all.sort((a, b) => b.time - a.time).slice(0, SHOWN);
      show();
    },
    /** Puts one in front, or in the place of the one with its id. */
    add(receipt) {
      receipts = [receipt, ...receipts.filter(({ id }) => id !== receipt.id)].slice(0, SHOWN);
      show();
      say(spoken, `${receipt.title}: ${receipt.line}`);
    },
  };
}
