// One row for each limit. What this page does not know by name is drawn by its schema.
import { h, fill, bytes } from "./dom.js";

const KNOWN = {
  schedule: ["Hours", "When it may work: 22:00-07:00; sat,sun 00:00-24:00", null, "always"],
  battery: ["Work on battery", "Also while the machine is not plugged in."],
  idle_minutes: ["Wait until nobody uses the machine", "Minutes without keyboard, mouse or a terminal; 0 works beside you.", [0, 60, 1], "min"],
  programs: ["Give way to programs", "Pauses while one of these runs: steam; blender", null, "none"],
  shared_gpu: ["Share the GPU", "Also while another program computes on it."],
  load: ["Give way to load", "Pauses while others take more than this part of all cores.", [0.05, 1, 0.05], "part"],
  temperature: ["Hottest", "Pauses while a sensor shows more, in degrees Celsius.", [50, 110, 1], "°C"],
  settle_minutes: ["Settle", "For so long must load, heat or a program be over before it goes on.", [0, 15, 0.5], "min"],
  threads: ["CPU threads", "For training. Off: all cores.", [1, navigator.hardwareConcurrency || 8, 1], ""],
  niceness: ["Step back for others", "0: as important as everything else; 19: only what nobody else wants.", [0, 19, 1], ""],
  fullscreen: ["Work under full-screen programs", "Also while a game or a film fills the screen."],
  gpu_power: ["GPU power", "Pauses while the GPUs draw more watts. Empty: no limit.", null, "W"],
  memory: ["Main memory", "Beyond it, the largest worker begins again with half the micro-batch. Empty: no limit.", null, "GB"],
  vram: ["GPU memory", "A worker that would take more runs out of it. Empty: no limit.", null, "GB"],
  upload: ["Upload speed", "Cap on what it sends. Empty: none.", null, "MB/s"],
  download: ["Download speed", "Cap on what it receives. Empty: none.", null, "MB/s"],
  upload_month: ["Upload each month", "Pauses after so much, until the next month. Empty: no limit.", null, "GB"],
  download_month: ["Download each month", "The same of what it receives. Empty: no limit.", null, "GB"],
  disk_quota: ["Disk", "For contributions; the oldest go first.", null, "GB"],
};
const UNITS = { "MB/s": 1e6, MB: 1e6, GB: 1e9 };

// What stands together: when it works, and how much it takes.
const AMOUNTS = new Set(["memory", "vram", "threads", "niceness", "upload", "download", "upload_month", "download_month", "disk_quota"]);

export const limitRows = (limits, save) => [["When it works", (one) => !AMOUNTS.has(one.name)], ["How much it takes", (one) => AMOUNTS.has(one.name)]].map(([title, belongs]) =>
  h("div", { class: "limits" }, h("h3", {}, title), limits.filter(belongs).map((one) => limitRow(one, save))));

function limitRow(limit, save) {
  const { name } = limit;
  const [title, help, range, unit = ""] = KNOWN[name] ?? [name.replaceAll("_", " "), ""];
  const kinds = (limit.schema.anyOf ?? [limit.schema]), kind = kinds.find((one) => one.type !== "null") ?? {}, optional = kinds.length > 1;
  if (kind.type === "object") return null; // for single runs: `potluck limits`
  const wrong = h("p", { class: "wrong", role: "alert" }), id = `limit-${name}`, control = h("div", { class: "control" });
  const change = async (value) => {
    fill(wrong);
    try { return await save(name, value); } catch (error) { wrong.textContent = error.message; return undefined; }
  };
  const parts = { id, limit, range, unit, kind, optional, change };
  control.append(...(kind.type === "boolean" ? toggle(parts) : kind.type === "array" ? words(parts) : range ? slider(parts) : number(parts)));
  return h("div", { class: "limit" }, h("label", { for: id }, title), h("p", { class: "help", id: `${id}-help` }, help), control, wrong);
}

const described = (id) => ({ id, "aria-describedby": `${id}-help` });

function toggle({ id, limit, change }) {
  const box = h("input", { ...described(id), type: "checkbox", role: "switch", checked: limit.value, onchange: () => change(box.checked) });
  return [box];
}

function words({ id, limit, unit, change }) {
  const box = h("input", { ...described(id), type: "text", spellcheck: "false", autocomplete: "off", placeholder: unit, onchange: () => change(box.value.split(";").map((word) => word.trim()).filter(Boolean)) });
  box.value = limit.value.join("; ");
  return [box];
}

function slider({ id, limit, range: [low, high, step], unit, optional, change }) {
  const told = h("output", { for: id }), shown = (value) => (unit === "part" ? `${Math.round(100 * value)} %` : `${value} ${unit}`.trim());
  const box = h("input", { ...described(id), type: "range", min: Math.min(low, limit.value ?? low), max: Math.max(high, limit.value ?? high), step });
  const tell = () => {
    told.textContent = box.disabled ? "off" : shown(Number(box.value));
    box.setAttribute("aria-valuetext", told.textContent);
  };
  box.value = limit.value ?? high;
  box.disabled = optional && limit.value === null;
  box.addEventListener("input", tell);
  box.addEventListener("change", () => change(Number(box.value)));
  tell();
  if (!optional) return [box, told];
  const on = h("input", { type: "checkbox", role: "switch", "aria-label": "on", "aria-describedby": `${id}-help`, checked: limit.value !== null, onchange: () => {
    box.disabled = !on.checked;
    tell();
    change(on.checked ? Number(box.value) : null);
  } });
  return [box, told, on];
}

function number({ id, limit, unit, optional, change }) {
  const size = UNITS[unit] ?? 1, shown = (value) => (value === null ? "" : String(value / size));
  const box = h("input", { ...described(id), type: "number", min: 0, step: "any", inputmode: "decimal", placeholder: optional ? "none" : null, onchange: async () => {
    const value = box.value === "" ? null : Math.round(Number(box.value) * size);
    const kept = await change(value);
    if (kept !== undefined) box.value = shown(kept);
  } });
  box.value = shown(limit.value);
  return [box, h("span", { class: "quiet" }, unit || (limit.value > 1e6 ? bytes(limit.value) : ""))];
}
