// @ts-check
/** What can be done with LoRA files from the rows: converting one to another key layout, and downloading the authors' files. */
import { openFilePicker } from "./file_picker.js";

/** How often the state of a download is asked for. */
const POLL_MS = 2000;

/**
 * @typedef {object} Host what of host.js is used here
 * @property {(path: string) => Promise<any>} getJson
 * @property {(path: string, body?: unknown) => Promise<any>} postJson
 * @property {(title: string, message: string) => Promise<boolean>} confirm
 * @property {(severity: "success" | "info" | "warn" | "error", summary: string, detail?: string) => void} toast
 */

/**
 * Ask for a layout and write the file in it, beside the original.
 *
 * @param {Host} host
 * @param {HTMLElement} anchor
 * @param {string} file
 * @param {(file: string) => void} onDone gets the new file's name
 */
export async function convertLayout(host, anchor, file, onDone) {
  try {
    const layouts = await host.getJson("/reward_lab/lora_layouts");
    const names = layouts.map((/** @type {any} */ layout) => layout.name);
    const label = (/** @type {string} */ name) => layouts.find((/** @type {any} */ layout) => layout.name === name)?.example ?? "";
    openFilePicker(anchor, {
      files: names,
      current: "",
      emptyText: "No layouts.",
      prompt: "Convert to which key layout?",
      note: label,
      onPick: (layout) => void convert(host, file, layout, onDone),
    });
  } catch (error) {
    host.toast("error", "The layouts could not be listed", /** @type {Error} */ (error).message);
  }
}

/**
 * @param {Host} host
 * @param {string} file
 * @param {string} layout
 * @param {(file: string) => void} onDone
 */
async function convert(host, file, layout, onDone) {
  try {
    const done = await host.postJson("/reward_lab/loras/convert", { file, layout });
    host.toast("success", "Converted", `${done.file}: ${done.keys} keys, from ${done.source_layout} to ${done.layout}. ${done.notes.join(" ")}`);
    onDone(done.file);
  } catch (error) {
    host.toast("error", "The file could not be converted", /** @type {Error} */ (error).message);
  }
}

/**
 * Offer the authors' files; one that is not here is downloaded after a question.
 *
 * @param {Host} host
 * @param {HTMLElement} anchor
 * @param {(file: string) => void} onDone gets the file's name among the LoRA files
 */
export async function chooseOfficial(host, anchor, onDone) {
  try {
    /** @type {any[]} */
    const files = await host.getJson("/reward_lab/official_loras");
    const byName = new Map(files.map((file) => [file.name, file]));
    openFilePicker(anchor, {
      files: [...byName.keys()],
      current: "",
      emptyText: "No official files are known.",
      prompt: "Official reward LoRAs",
      note: (name) => describe(byName.get(name)),
      onPick: (name) => void take(host, byName.get(name), onDone),
    });
  } catch (error) {
    host.toast("error", "The official files could not be listed", /** @type {Error} */ (error).message);
  }
}

/** @param {any} file */
function describe(file) {
  const size = `${(file.expected_bytes / 1e9).toFixed(2)} GB`;
  /** @type {Record<string, string>} */
  const states = {
    present: "here",
    downloading: `downloading, ${(file.done_bytes / 1e6).toFixed(0)} MB so far`,
    failed: "the last try failed",
  };
  const state = states[file.state] ?? `download ${size}`;
  return `${file.reward}, ${file.expert} noise, ${file.steps} steps · ${state}${file.advice ? ` · ${file.advice}` : ""}`;
}

/**
 * @param {Host} host
 * @param {any} file
 * @param {(file: string) => void} onDone
 */
async function take(host, file, onDone) {
  if (file.state === "present") {
    onDone(file.file);
    return;
  }
  const question = `Download ${file.name} (about ${(file.expected_bytes / 1e9).toFixed(2)} GB) from huggingface.co/${file.repository} into the LoRA folder?`;
  try {
    if (file.state !== "downloading" && !(await host.confirm("Download the file?", question))) return;
    let state = await host.postJson("/reward_lab/official_loras/download", { name: file.name });
    host.toast("info", "Downloading", file.name);
    while (state.state === "downloading") {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      const states = await host.getJson("/reward_lab/official_loras");
      state = states.find((/** @type {any} */ other) => other.name === file.name);
    }
    if (state.state !== "present") throw new Error(state.error ?? "the download stopped");
    host.toast("success", "Downloaded", `${state.file}: ${state.strength_note}.`);
    onDone(state.file);
  } catch (error) {
    host.toast("error", "The file could not be downloaded", /** @type {Error} */ (error).message);
  }
}
