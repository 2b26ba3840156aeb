// The live lines on a node: policy and last receipt of a loader, progress and prediction of a run.

import { predict } from "./connection.js";
import { make, say } from "./dom.js";
import { POLICIES, clock, size } from "./format.js";

const LINE_PIXELS = 16;

/** Value of a widget of a node, or undefined. */
const valueOf = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value;

/**
 * Adds the status widget to a node; it is neither saved nor sent with a prompt.
 *
 * @returns {{update(message), changed()}}
 */
export function statusOn(node) {
  const policy = make("div");
  const bar = make("progress", { hidden: true, max: 1 });
  const run = make("div", { hidden: true });
  const need = make("div", { hidden: true });
  const receipt = make("div", { hidden: true });
  const element = make("div", { className: "svr-node" }, policy, bar, run, need, receipt);
  const lines = () => [...element.children].filter((child) => !child.hidden).length;
  node.addDOMWidget("steadyvsr_status", "steadyvsr", element, {
    serialize: false,
    hideOnZoom: true,
    getMinHeight: () => lines() * LINE_PIXELS + 6,
    getMaxHeight: () => 6 * LINE_PIXELS,
    getValue: () => "",
    setValue: () => {},
  });

  function put(target, text, level = "") {
    say(target, text);
    target.hidden = !text;
    target.dataset.level = level;
  }

  function showPolicy() {
    const wish = valueOf(node, "keep_loaded");
    put(policy, wish === undefined ? "" : `Asked: ${POLICIES[wish] ?? wish}`);
  }

  showPolicy();
  return {
    /** A message of the server about this node; what it does not mention stays. */
    update(message) {
      if (message.policy) put(policy, `${POLICIES[message.policy]}${message.policy_reason ? ` (${message.policy_reason})` : ""}`);
      if (message.receipt) put(receipt, message.receipt.line, message.receipt.verdict === "STILL_HELD" ? "warn" : "");
      if (message.progress) {
        const { phase, frames, total, fps, eta } = message.progress;
        bar.hidden = !total;
        bar.value = total ? frames / total : 0;
        const rest = eta === null ? "" : ` · ${clock(eta)} left`;
        put(run, `${phase} · ${frames}${total ? ` of ${total}` : ""} frames · ${fps.toFixed(2)} fps${rest}`);
      }
      if (message.memory) showNeed(message.memory);
    },
    /** The node's inputs were changed. */
    async changed() {
      showPolicy();
      const known = inputSize(node);
      if (valueOf(node, "scale") === undefined || !known) return;
      try {
        showNeed(await predict({ ...known, ...settingsOf(node) }));
      } catch {
        put(need, ""); // no server, or a setting in the middle of being typed
      }
    },
  };

  function showNeed({ predicted, measured, budget, advice }) {
    const parts = [];
    if (measured != null) parts.push(`peak ${size(measured)} measured`);
    if (predicted != null) parts.push(`${size(predicted)} predicted`);
    if (budget != null) parts.push(`${size(budget)} allowed`);
    put(need, [parts.join(" · "), advice].filter(Boolean).join(" — "), advice ? "warn" : "");
  }
}

/** The loader's choice that reaches this node, and its own settings, as the prediction takes them. */
function settingsOf(node) {
  const loader = source(node, "flashvsr");
  return {
    // What is undefined is not sent.
    model_set: loader ? valueOf(loader, "model_set") : undefined,
    precision: loader ? valueOf(loader, "precision") : undefined,
    scale: valueOf(node, "scale"),
    kv_ratio: valueOf(node, "kv_ratio"),
    budget_gb: valueOf(node, "budget_gb"),
  };
}

/** The node that feeds an input. */
function source(node, name) {
  const index = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return index < 0 ? null : node.getInputNode(index);
}

/** Width and height of what comes in, where the graph shows it before a run: number widgets, or a loaded picture. */
function inputSize(node) {
  const feeding = source(node, "image") ?? source(node, "video");
  if (!feeding) return null;
  const [width, height] = [valueOf(feeding, "width"), valueOf(feeding, "height")];
  if (Number.isInteger(width) && Number.isInteger(height)) return { width, height };
  const picture = feeding.imgs?.[0];
  if (picture?.naturalWidth) return { width: picture.naturalWidth, height: picture.naturalHeight };
  return null;
}
