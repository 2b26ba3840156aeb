// Words and numbers as the panel writes them. Nothing here touches the page.

const GIB = 2 ** 30;
const MIB = 2 ** 20;

/** Bytes as text: "6.10 GiB", "12 MiB"; null is "unknown", never 0. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return "unknown";
  if (Math.abs(bytes) >= GIB / 2) return `${(bytes / GIB).toFixed(2)} GiB`;
  return `${(bytes / MIB).toFixed(bytes && Math.abs(bytes) < 10 * MIB ? 1 : 0)} MiB`;
}

/** A part of a whole: "15.0 of 24.0 GiB", or "3.3 MiB of 24.0 GiB"; what is unknown is said so. */
export function share(part, whole) {
  if (part === null || whole === null) return `${size(part)} of ${size(whole)}`;
  const [unit, name] = whole >= GIB / 2 ? [GIB, "GiB"] : [MIB, "MiB"];
  if (part && Math.abs(part) < unit / 20) return `${size(part)} of ${(whole / unit).toFixed(1)} ${name}`;
  return `${(part / unit).toFixed(1)} of ${(whole / unit).toFixed(1)} ${name}`;
}

/** Seconds as "just now", "40 s", "12 min", "3 h". */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return "never";
  if (seconds < 3) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** A remaining time: "0:42", "1:02:05". */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (value) => String(value).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

export const POLICIES = { no: "not kept", keep: "kept", pin: "pinned" };

/** The parts of a device's bar, in order. Null bytes are called unknown; a part that a device does not have is left out. */
export const PARTS = [
  { id: "kept", label: "Kept by us" },
  { id: "models", label: "Other models" },
  { id: "working", label: "In use by runs" },
  { id: "own", label: "ComfyUI itself" },
  { id: "pool", label: "Pool, unused" },
  { id: "context", label: "Driver's own" },
  { id: "others", label: "Other processes" },
  { id: "free", label: "Free" },
];
