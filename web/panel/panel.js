// The memory panel: devices, models, actions, receipts. It asks the server to push while it is open, and stops that.

import * as connection from "./connection.js";
import { deviceList } from "./devices.js";
import { make, say } from "./dom.js";
import { modelTable } from "./models.js";
import { receiptList } from "./receipts.js";

/** An action that failed, in the place where its receipt would stand. */
function failure(title, error) {
  return { id: `local-${performance.now()}`, time: Date.now() / 1000, title, line: error.message, verdict: "FAILED", models: [] };
}

/**
 * Shows the panel in `parent`.
 *
 * @param onState called with every state, for the badge of the tab.
 * @returns {() => void} takes everything away again: listeners, the push, the elements.
 */
export function openPanel(parent, onState = () => {}) {
  const receipts = receiptList();
  const devices = deviceList();
  let closed = false;

  async function act(title, action) {
    try {
      const answer = await action();
      if (answer.receipt) receipts.add(answer.receipt);
    } catch (error) {
      receipts.add(failure(title, error));
    }
  }

  const models = modelTable({
    keep: (model) => act(`Keep ${model.name}`, () => connection.policy(model.id, "keep")),
    offload: (model) => act(`Offload ${model.name}`, () => connection.offload(model.handle)),
    release: (model) => act(`Release ${model.name}`, () => connection.release([model.id])),
  });
  const button = (text, title, action) => make("button", { type: "button", title, on: { click: () => act(text, action) } }, text);
  const buttons = make(
    "div",
    { className: "svr-buttons" },
    button("Unload models", "Everything but kept models leaves the devices; results of nodes stay", () => connection.free({ unload_models: true, free_memory: false })),
    button("Free everything but kept", "As above, and the results of nodes are dropped too", () => connection.free({ unload_models: true, free_memory: true })),
    button("Release kept too", "Gives up every kept model, then frees everything", async () => {
      await connection.release(null);
      return connection.free({ unload_models: true, free_memory: true });
    }),
  );
  const status = make("p", { className: "svr-status", role: "status" }, "Connecting …");
  const off = make("p", { className: "svr-note svr-off", hidden: true });
  const element = make("div", { className: "svr-panel" }, status, off, buttons, devices.element, models.element, receipts.element);
  parent.append(element);

  function show(state) {
    if (closed) return;
    say(status, state.prompt ? "A prompt is running: actions wait for its end." : "");
    status.hidden = !status.textContent;
    say(off, state.promises_off.length ? `Not in this ComfyUI: ${state.promises_off.join("; ")}.` : "");
    off.hidden = !off.textContent;
    element.classList.remove("svr-stale");
    devices.update(state);
    models.update(state);
    onState(state);
  }

  function lost() {
    say(status, "The server does not answer. The numbers below are old.");
    status.hidden = false;
    element.classList.add("svr-stale");
  }

  async function begin() {
    try {
      await connection.watch(true);
      show(await connection.state());
      receipts.merge((await connection.receipts()).receipts);
    } catch (error) {
      if (!closed) lost();
    }
  }

  const stopListening = connection.listen({
    "steadyvsr.state": ({ detail }) => show(detail),
    "steadyvsr.receipt": ({ detail }) => receipts.add(detail),
    reconnecting: lost,
    reconnected: begin,
  });
  const resized = new ResizeObserver(() => devices.redraw());
  resized.observe(element);
  begin();

  return () => {
    closed = true;
    stopListening();
    resized.disconnect();
    element.remove();
    connection.watch(false).catch(() => {}); // the server forgets a client that is gone anyway
  };
}
