// @ts-check
/** The sidebar tab: all training runs, newest first. `mount` draws into an element and returns what undoes it. */
import { el, icon, onceAFrame, setText } from "./dom.js";
import { isLive } from "./events.js";
import { openLabelPage } from "./label_page.js";
import { createRunCard } from "./run_card.js";

/** @typedef {import("./run_store.js").RunStore} RunStore */
/** @typedef {import("./run_store.js").RunInfo} RunInfo */

/**
 * @typedef {object} Host
 * @property {(title: string, message: string) => Promise<boolean>} confirm
 * @property {(severity: "success" | "info" | "warn" | "error", summary: string, detail?: string) => void} toast
 * @property {(path: string) => string} fileUrl
 * @property {(path: string) => Promise<any>} getJson
 * @property {(path: string, body?: unknown) => Promise<any>} postJson
 */

/** @type {Set<string>} cards that the user opened or closed; kept while the tab is away */
const openRuns = new Set();
/** @type {Set<string>} */
const touchedRuns = new Set();

/** @type {string | null} the run to bring into view when its card is next drawn */
let wantedRun = null;

/**
 * Open a run's card and bring it into view, now or when the tab is opened.
 *
 * @param {RunStore} store
 * @param {string} id
 */
export function reveal(store, id) {
  openRuns.add(id);
  touchedRuns.add(id);
  wantedRun = id;
  store.dispatchEvent(new Event("change"));
}

/**
 * @param {HTMLElement} root
 * @param {RunStore} store
 * @param {Host} host
 * @returns {() => void} unmount
 */
export function mount(root, store, host) {
  const refresh = el("button", { class: "rl-icon-button", type: "button", title: "Read the runs again", "aria-label": "Refresh" }, [icon("refresh")]);
  const label = el("button", { class: "rl-icon-button", type: "button", title: "Label videos and vote blind", "aria-label": "Label and vote" }, [icon("heart")]);
  const count = el("span", { class: "rl-count" });
  const notice = el("div", { class: "rl-notice", role: "status" });
  const list = el("div", { class: "rl-run-list" });
  const empty = emptyState();
  const panel = el("div", { class: "rl-root rl-panel", data: { rewardLab: "panel" } }, [
    el("header", { class: "rl-panel-head" }, [el("span", { class: "rl-panel-title", text: "Reward Lab" }), count, label, refresh]),
    notice,
    list,
    empty,
  ]);
  /** @type {Map<string, ReturnType<typeof createRunCard>>} */
  const cards = new Map();
  const actions = cardActions(store, host, () => frame.request());

  const render = () => {
    setText(notice, store.error ?? "");
    notice.hidden = !store.error;
    empty.hidden = !store.isLoaded || store.runs.size > 0;
    const live = [...store.runs.values()].filter(isLive).length;
    setText(count, store.runs.size ? `${store.runs.size} run${store.runs.size > 1 ? "s" : ""}${live ? `, ${live} live` : ""}` : "");
    openByDefault(store);
    for (const [id, card] of cards) {
      if (store.runs.has(id)) continue;
      card.destroy();
      card.element.remove();
      cards.delete(id);
    }
    let before = list.firstElementChild;
    for (const [id, run] of store.runs) {
      const card = cards.get(id) ?? createRunCard(id, actions);
      cards.set(id, card);
      if (card.element !== before) list.insertBefore(card.element, before);
      else before = before.nextElementSibling;
      card.update(run, openRuns.has(id) ? store.watch(id) : null);
    }
    const wanted = wantedRun ? cards.get(wantedRun) : null;
    if (!wanted || !panel.isConnected) return;
    wanted.element.scrollIntoView({ block: "start", behavior: "smooth" });
    wantedRun = null;
  };
  const frame = onceAFrame(render);
  const onChange = () => frame.request();
  store.addEventListener("change", onChange);
  refresh.addEventListener("click", () => void store.reload());
  label.addEventListener("click", () => void openLabelPage(host));
  root.replaceChildren(panel);
  render();
  void store.start();
  return () => {
    store.removeEventListener("change", onChange);
    frame.cancel();
    for (const card of cards.values()) card.destroy();
    panel.remove();
  };
}

/**
 * The newest run and all that are live stand open until the user decides otherwise.
 *
 * @param {RunStore} store
 */
function openByDefault(store) {
  let isNewest = true;
  for (const [id, run] of store.runs) {
    if ((isNewest || isLive(run)) && !touchedRuns.has(id)) {
      openRuns.add(id);
      touchedRuns.add(id);
    }
    isNewest = false;
  }
}

/**
 * @param {RunStore} store
 * @param {Host} host
 * @param {() => void} redraw
 * @returns {import("./run_card.js").Actions}
 */
function cardActions(store, host, redraw) {
  return {
    toggle(id) {
      touchedRuns.add(id);
      if (!openRuns.delete(id)) openRuns.add(id);
      redraw();
    },
    async stop(run) {
      const isSure = await host.confirm(
        "Stop this training run?",
        `${run.name || run.id} is at step ${run.step} of ${run.steps}. It finishes its step, writes a checkpoint and a LoRA that can be used, and ends.`,
      );
      if (!isSure) return;
      try {
        await store.requestStop(run.id);
        host.toast("info", "Stopping", `${run.name || run.id} saves its LoRA and ends.`);
      } catch (error) {
        host.toast("error", "The run could not be stopped", /** @type {Error} */ (error).message);
      }
    },
    async copy(text) {
      try {
        await navigator.clipboard.writeText(text);
        host.toast("success", "Copied", text.length < 120 ? text : "");
      } catch (error) {
        host.toast("warn", "The browser did not allow copying", /** @type {Error} */ (error).message);
      }
    },
    fileUrl: (id, file) => host.fileUrl(`/reward_lab/runs/${encodeURIComponent(id)}/files/${file.split("/").map(encodeURIComponent).join("/")}`),
  };
}

function emptyState() {
  const steps = [
    "Open Templates and choose “3 train a reward lora”, or connect Load Wan2.2 Models, Prompt Set and Load Reward Model to Train Reward LoRA.",
    "Press Run. Training goes on in a process of its own, the queue stays free.",
    "Watch the curves here. Stop saves a LoRA that can be used.",
  ];
  return el("div", { class: "rl-empty" }, [
    icon("chart-line"),
    el("div", { class: "rl-empty-title", text: "No training runs yet" }),
    el(
      "ol",
      {},
      steps.map((text) => el("li", { text })),
    ),
  ]);
}
