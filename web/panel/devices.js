// One card for each device: a stacked bar, its numbers, and the last two minutes.

import { follow, make, say } from "./dom.js";
import { PARTS, share, size } from "./format.js";
import { Timeline } from "./timeline.js";

const LEVELS = { warn: "filling up", critical: "almost full" };

function legendRow(part) {
  const value = make("dd", { className: "svr-number" });
  const row = make(
    "div",
    { className: "svr-legend-row", data: { part: part.id } },
    make("dt", {}, make("span", { className: "svr-swatch", aria: { hidden: "true" } }), part.label),
    value,
  );
  return { row, value };
}

/** A card that follows one device of the state. */
export function deviceCard() {
  const title = make("h3", { className: "svr-device-name" });
  const fill = make("span", { className: "svr-number" });
  const level = make("span", { className: "svr-level", role: "status" });
  const segments = Object.fromEntries(PARTS.map(({ id }) => [id, make("span", { className: "svr-segment", data: { part: id } })]));
  const bar = make("div", { className: "svr-bar", role: "img" }, ...Object.values(segments));
  const legend = Object.fromEntries(PARTS.map((part) => [part.id, legendRow(part)]));
  const canvas = make("canvas", { className: "svr-timeline", role: "img" });
  const peak = make("span", { className: "svr-number" });
  const notes = make("p", { className: "svr-quiet" });
  const timeline = new Timeline(canvas);
  const element = make(
    "section",
    { className: "svr-card" },
    make("div", { className: "svr-row" }, title, fill),
    bar,
    make("dl", { className: "svr-legend" }, ...PARTS.map(({ id }) => legend[id].row)),
    canvas,
    make("div", { className: "svr-row svr-quiet" }, make("span", {}, "last 2 min · peak"), peak),
    level,
    notes,
  );

  function update(device, { phases, time }) {
    say(title, device.name ? `${device.device} · ${device.name}` : device.device);
    say(fill, share(device.used, device.total));
    fill.title = device.source ? `Read from ${device.source}` : "";
    const words = [];
    for (const { id, label } of PARTS) {
      const bytes = device.parts[id] ?? null;
      const grow = bytes !== null && device.total ? Math.max(0, bytes) / device.total : 0;
      segments[id].style.flexGrow = String(grow);
      segments[id].hidden = grow === 0;
      legend[id].row.hidden = !(id in device.parts);
      say(legend[id].value, size(bytes));
      legend[id].row.classList.toggle("svr-unknown", bytes === null);
      if (bytes !== null) words.push(`${label} ${size(bytes)}`);
    }
    bar.setAttribute("aria-label", words.join(", ") || "nothing is known");
    element.dataset.level = device.level;
    say(level, LEVELS[device.level] ?? "");
    level.hidden = !(device.level in LEVELS);
    const others = device.processes.map((process) => `${process.name} (${process.pid}) ${size(process.bytes)}`);
    say(notes, [...others, ...device.notes].join(" · "));
    notes.hidden = !notes.textContent;
    timeline.add(time, device.used, device.total);
    timeline.phases = phases;
    timeline.draw();
    say(peak, size(timeline.peak()));
    canvas.setAttribute("aria-label", `In use over the last two minutes; peak ${size(timeline.peak())}`);
  }

  return { element, update, redraw: () => timeline.draw() };
}

/** The cards of all devices. */
export function deviceList() {
  const element = make("div", { className: "svr-devices" });
  const rows = new Map();
  return {
    element,
    update(state) {
      follow(element, rows, state.devices, (device) => device.device, deviceCard, state);
    },
    redraw() {
      for (const row of rows.values()) row.redraw();
    },
  };
}
