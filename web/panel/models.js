// The table of resident models, each with what a user can do about it.

import { follow, make, say } from "./dom.js";
import { age, share, size } from "./format.js";

/** What is known of a model in one line: kind, number format, device, last use. */
function facts(model, time) {
  const parts = [model.kind, model.dtype, model.device];
  if (model.last_used !== null) parts.push(age(time - model.last_used));
  // A line may break between facts, not within one.
  return parts.filter(Boolean).map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

function modelRow(actions) {
  const name = make("span", { className: "svr-model-name" });
  const bytes = make("span", { className: "svr-number" });
  const line = make("div", { className: "svr-quiet" });
  let model = null;
  const button = (text, listener) => make("button", { type: "button", className: "svr-small", on: { click: () => listener(model) } }, text);
  const keep = button("Keep", (item) => actions.keep(item));
  const offload = button("Offload", (item) => actions.offload(item));
  const release = button("Release", (item) => actions.release(item));
  const element = make(
    "li",
    { className: "svr-model" },
    make("div", { className: "svr-row" }, name, bytes),
    line,
    make("div", { className: "svr-actions" }, keep, offload, release),
  );

  function update(item, { time }) {
    model = item;
    const resident = item.bytes === item.size ? size(item.bytes) : share(item.bytes, item.size);
    say(name, item.name);
    name.title = item.name;
    say(bytes, resident);
    say(line, facts(item, time));
    element.dataset.policy = item.policy ?? "";
    const owned = item.policy === "keep" || item.policy === "pin";
    keep.hidden = !item.id || owned;
    release.hidden = !owned;
    offload.disabled = !item.bytes || !item.movable;
    offload.title = item.movable ? "Moves it off the device and measures what left" : "It rests on the device where it computes";
    for (const [control, verb] of [[keep, "Keep"], [offload, "Offload"], [release, "Release"]]) {
      control.setAttribute("aria-label", `${verb} ${item.name}`);
    }
  }

  return { element, update };
}

/** @param actions {keep(model), offload(model), release(model)} */
export function modelTable(actions) {
  const list = make("ul", { className: "svr-models" });
  const empty = make("p", { className: "svr-quiet" }, "No model is loaded, and none is kept.");
  const heading = make("h3", {}, "Models");
  const sum = make("span", { className: "svr-number svr-quiet" });
  const element = make("section", { className: "svr-card" }, make("div", { className: "svr-row" }, heading, sum), list, empty);
  const rows = new Map();
  return {
    element,
    update(state) {
      const { residents, ram } = state;
      follow(list, rows, residents, (model) => model.handle, () => modelRow(actions), state);
      empty.hidden = residents.length > 0;
      say(sum, ram.kept ? `kept ${share(ram.kept, ram.budget)} of RAM` : "");
    },
  };
}
