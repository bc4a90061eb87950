// @ts-check
/** Small views that sit on nodes: the text a node reports, and the progress of a training run. */
import { el, icon, setText, shieldFromCanvas } from "./dom.js";
import { hasFailed } from "./events.js";
import { createRunChart } from "./run_chart.js";
import { headLine } from "./run_card.js";

/** @typedef {import("./run_store.js").RunStore} RunStore */

/**
 * Text that a node returned, with a link to a page where it has one.
 *
 * @returns {{ element: HTMLElement, show(text: string, page?: { label: string, url: string } | null): void }}
 */
export function createTextView() {
  const body = el("div", { class: "rl-text", tabindex: "0" });
  const link = el("a", { class: "rl-button rl-small", target: "_blank", rel: "noopener", hidden: true });
  const element = el("div", { class: "rl-root rl-text-root" }, [body, link]);
  shieldFromCanvas(element);
  body.addEventListener("wheel", (event) => {
    if (body.scrollHeight > body.clientHeight) event.stopPropagation();
  });
  return {
    element,
    show(text, page = null) {
      setText(body, text);
      link.hidden = !page;
      if (!page) return;
      link.href = page.url;
      link.replaceChildren(icon("external-link"), el("span", { text: page.label }));
    },
  };
}

/**
 * Progress of the run that a node started or waits for.
 *
 * @param {RunStore} store
 * @param {(id: string) => void} onOpen the user wants to see the run in the sidebar
 * @returns {{ element: HTMLElement, follow(id: string): void, runId(): string | null, destroy(): void }}
 */
export function createRunView(store, onOpen) {
  const chart = createRunChart({ height_px: 72, compact: true });
  const badge = el("span", { class: "rl-badge" });
  const line = el("span", { class: "rl-run-line" });
  const bar = el("div", { class: "rl-bar-fill" });
  const open = el("button", { class: "rl-button rl-small", type: "button", title: "Show this run in the Reward Lab tab" }, [
    icon("chart-line"),
    el("span", { text: "Details" }),
  ]);
  const element = el("div", { class: "rl-root rl-node-run" }, [
    el("div", { class: "rl-node-run-head" }, [badge, line, open]),
    el("div", { class: "rl-bar" }, [bar]),
    chart.element,
  ]);
  /** @type {string | null} */
  let id = null;
  shieldFromCanvas(element);
  open.addEventListener("click", () => id && onOpen(id));
  const render = () => {
    const run = id ? store.runs.get(id) : null;
    open.hidden = !run;
    if (!id || !run) {
      element.dataset.state = "none";
      setText(badge, "");
      setText(line, id ? "run unknown to this server" : "Press Run to start training.");
      return;
    }
    element.dataset.state = run.state;
    const detail = store.watch(id);
    setText(badge, run.state);
    setText(line, hasFailed(run) ? (detail.failure?.error ?? run.error ?? run.state) : headLine(run, detail));
    line.title = line.textContent ?? "";
    bar.style.width = `${run.steps ? Math.min(100, (100 * run.step) / run.steps) : 0}%`;
    chart.show(detail);
  };
  store.addEventListener("change", render);
  render();
  return {
    element,
    follow(next) {
      id = next;
      if (!store.runs.has(next)) void store.start();
      render();
    },
    runId: () => id,
    destroy() {
      store.removeEventListener("change", render);
      chart.destroy();
    },
  };
}
