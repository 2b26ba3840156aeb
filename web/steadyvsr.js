// What SteadyVSR adds to ComfyUI's front end: the memory panel, commands, settings, and status lines on its nodes.

import { app } from "../../scripts/app.js";
import * as connection from "./panel/connection.js";
import { make } from "./panel/dom.js";
import { statusOn } from "./panel/node_status.js";
import { openPanel } from "./panel/panel.js";

const STYLESHEET = new URL("steadyvsr.css", import.meta.url).href;
const TAB = "steadyvsr";
const NODE_PREFIX = "SteadyVSR_";
const statuses = new Map();

function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: 6000 });
}

/** Runs an action of the palette; its receipt comes as an event, its failure as a toast. */
async function command(title, action) {
  try {
    await action();
  } catch (error) {
    toast("error", title, error.message);
  }
}

/** The fill of the fullest device, on the tab's icon. */
function badge(state) {
  const tab = app.extensionManager?.sidebarTab?.sidebarTabs?.find(({ id }) => id === TAB);
  if (!tab) return;
  const shares = state.devices.filter(({ used, total }) => used !== null && total).map(({ used, total }) => used / total);
  tab.iconBadge = shares.length ? `${Math.round(100 * Math.max(...shares))}%` : null;
}

let close = null;

function registerTab() {
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-bar",
    title: "Memory",
    tooltip: "SteadyVSR memory",
    type: "custom",
    render: (element) => {
      close?.();
      close = openPanel(element, badge);
    },
    destroy: () => {
      close?.();
      close = null;
      badge({ devices: [] });
    },
  });
}

/** What Load FlashVSR offers, read from its definition. */
let attentionChoices = ["auto"];

const SETTINGS = [
  { id: "SteadyVSR.WarnPercent", key: "warn_percent", name: "Warn when a card is this full (percent)", type: "slider", attrs: { min: 50, max: 99, step: 1 }, defaultValue: 80 },
  { id: "SteadyVSR.CriticalPercent", key: "critical_percent", name: "Warn strongly when a card is this full (percent)", type: "slider", attrs: { min: 50, max: 99, step: 1 }, defaultValue: 92 },
  { id: "SteadyVSR.KeptRamGiB", key: "kept_ram_gib", name: "RAM that kept models may use (GiB, 0 = half of the machine's)", type: "number", attrs: { min: 0, max: 4096, step: 1 }, defaultValue: 0 },
  { id: "SteadyVSR.LeastRamGiB", key: "least_ram_gib", name: "Free RAM while idle when less than this is available (GiB, 0 = a tenth of the machine's)", type: "number", attrs: { min: 0, max: 4096, step: 1 }, defaultValue: 0 },
  { id: "SteadyVSR.ResetWhenShort", key: "reset_when_short", name: "Reset the node cache while idle when RAM is short", type: "boolean", defaultValue: true },
  { id: "SteadyVSR.DefaultPolicy", key: null, name: "keep_loaded of new loader nodes", type: "combo", options: ["no", "keep", "pin"], defaultValue: "no" },
  { id: "SteadyVSR.DefaultAttention", key: null, name: "Attention of new Load FlashVSR nodes", type: "combo", options: () => attentionChoices.map((name) => ({ text: name, value: name })), defaultValue: "auto" },
];

const setting = (id) => app.ui?.settings?.getSettingValue?.(id) ?? SETTINGS.find((entry) => entry.id === id).defaultValue;

/** Tells the server the settings that it acts on. */
async function sendSettings() {
  const value = ({ id, type }) => (type === "boolean" ? Boolean(setting(id)) : Number(setting(id)));
  const values = Object.fromEntries(SETTINGS.filter(({ key }) => key).map((entry) => [entry.key, value(entry)]));
  try {
    await connection.settings(values);
  } catch (error) {
    toast("warn", "SteadyVSR: settings not taken", error.message);
  }
}

let ready = false;

app.registerExtension({
  name: "SteadyVSR",
  settings: SETTINGS.map(({ key, ...declared }) => ({
    ...declared,
    category: ["SteadyVSR", "Memory", declared.name],
    onChange: () => {
      if (ready && key) sendSettings();
    },
  })),
  commands: [
    { id: "SteadyVSR.UnloadModels", label: "SteadyVSR: unload models, keep what is kept", icon: "pi pi-eject", function: () => command("Unload models", () => connection.free({ unload_models: true, free_memory: false })) },
    { id: "SteadyVSR.FreeAllButKept", label: "SteadyVSR: free everything but kept", icon: "pi pi-trash", function: () => command("Free everything but kept", () => connection.free({ unload_models: true, free_memory: true })) },
    { id: "SteadyVSR.ReleaseKept", label: "SteadyVSR: release kept models", icon: "pi pi-lock-open", function: () => command("Release kept models", () => connection.release(null)) },
  ],

  async setup() {
    document.head.append(make("link", { rel: "stylesheet", href: STYLESHEET }));
    registerTab();
    connection.listen({
      "steadyvsr.node": ({ detail }) => statuses.get(String(detail.node))?.update(detail),
    });
    ready = true;
    await sendSettings();
  },

  beforeRegisterNodeDef(_nodeType, { name, input }) {
    if (name !== `${NODE_PREFIX}LoadFlashVSR`) return;
    const [choices, details] = input.required.attention;
    attentionChoices = Array.isArray(choices) ? choices : details.options;
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(NODE_PREFIX)) return;
    // A saved workflow sets its own values after this.
    for (const [widget, id] of [["keep_loaded", "SteadyVSR.DefaultPolicy"], ["attention", "SteadyVSR.DefaultAttention"]]) {
      const found = node.widgets?.find(({ name }) => name === widget);
      if (found) found.value = setting(id);
    }
    const status = statusOn(node);
    const changed = () => status.changed();
    for (const widget of node.widgets ?? []) {
      const before = widget.callback;
      widget.callback = function (...values) {
        const result = before?.apply(this, values);
        changed();
        return result;
      };
    }
    const connected = node.onConnectionsChange;
    node.onConnectionsChange = function (...values) {
      const result = connected?.apply(this, values);
      changed();
      return result;
    };
    // A workflow that is opened sets widgets without calling them.
    const configured = node.onConfigure;
    node.onConfigure = function (...values) {
      const result = configured?.apply(this, values);
      changed();
      return result;
    };
    const removed = node.onRemoved;
    node.onRemoved = function (...values) {
      statuses.delete(String(node.id));
      return removed?.apply(this, values);
    };
    // The id is given when the node is put into a graph, after this.
    const added = node.onAdded;
    node.onAdded = function (...values) {
      const result = added?.apply(this, values);
      statuses.set(String(node.id), status);
      return result;
    };
  },
});
