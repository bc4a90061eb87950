// @ts-check
/** One training run in the sidebar: a head that is always there and, when open, curves, figures, sample, files or the failure. */
import { el, icon, setText } from "./dom.js";
import { hasFailed, isLive } from "./events.js";
import { createRunChart } from "./run_chart.js";
import { formatDuration, remaining_s } from "./run_store.js";

/** @typedef {import("./run_store.js").RunInfo} RunInfo */
/** @typedef {import("./run_store.js").RunDetail} RunDetail */

/**
 * @typedef {object} Actions
 * @property {(id: string) => void} toggle open or close the card
 * @property {(run: RunInfo) => void} stop
 * @property {(text: string) => void} copy
 * @property {(id: string, file: string) => string} fileUrl
 */

/**
 * @param {string} id
 * @param {Actions} actions
 * @returns {{ element: HTMLElement, update(run: RunInfo, detail: RunDetail | null): void, destroy(): void }}
 */
export function createRunCard(id, actions) {
  const name = el("span", { class: "rl-run-name" });
  const badge = el("span", { class: "rl-badge" });
  const bar = el("div", { class: "rl-bar-fill" });
  const line = el("div", { class: "rl-run-line" });
  const chevron = icon("chevron-right");
  const head = el("button", { class: "rl-run-head", type: "button", "aria-expanded": "false" }, [
    el("div", { class: "rl-run-title" }, [chevron, name, badge]),
    el("div", { class: "rl-bar" }, [bar]),
    line,
  ]);
  head.addEventListener("click", () => actions.toggle(id));
  const body = el("div", { class: "rl-run-body" });
  const element = el("section", { class: "rl-run", data: { run: id } }, [head, body]);
  /** @type {ReturnType<typeof createRunBody> | null} */
  let content = null;

  const close = () => {
    content?.destroy();
    content = null;
    body.replaceChildren();
  };
  return {
    element,
    update(run, detail) {
      element.dataset.state = run.state;
      setText(name, run.name || run.id);
      name.title = run.id;
      setText(badge, run.state);
      bar.style.width = `${run.steps ? Math.min(100, (100 * run.step) / run.steps) : 0}%`;
      setText(line, headLine(run, detail));
      head.setAttribute("aria-expanded", String(detail !== null));
      element.classList.toggle("rl-open", detail !== null);
      if (!detail) return close();
      if (!content) {
        content = createRunBody(id, actions);
        body.replaceChildren(content.element);
      }
      content.update(run, detail);
    },
    destroy: close,
  };
}

/**
 * @param {RunInfo} run
 * @param {RunDetail | null} detail
 */
export function headLine(run, detail) {
  if (run.state === "broken") return "cannot be read";
  const reward = lastReward(run, detail);
  const left = remaining_s(run, detail ?? undefined);
  const isWaiting = run.state === "created" || (run.state === "running" && !run.step);
  return [
    isWaiting ? run.preparing || "loading models" : `step ${run.step} of ${run.steps}`,
    reward === null ? "" : `${detail?.started?.measure ?? "reward"} ${reward.toFixed(4)}`,
    left === null ? "" : `${formatDuration(left)} left`,
  ]
    .filter(Boolean)
    .join("  ·  ");
}

/**
 * @param {RunInfo} run
 * @param {RunDetail | null} detail
 * @returns {number | null}
 */
function lastReward(run, detail) {
  const last = detail?.reward.last?.y ?? run.reward;
  return typeof last === "number" ? last : null;
}

/**
 * @param {string} id
 * @param {Actions} actions
 */
function createRunBody(id, actions) {
  const chart = createRunChart();
  const figures = el("dl", { class: "rl-figures" });
  const sample = el("figure", { class: "rl-sample" });
  const files = el("div", { class: "rl-files" });
  const failure = el("div", { class: "rl-failure" });
  const buttons = el("div", { class: "rl-actions" });
  const element = el("div", {}, [failure, chart.element, figures, buttons, sample, files]);
  let [shownSample, shownFiles, shownState, shownFailure] = ["", "", "", ""];

  return {
    element,
    destroy: () => chart.destroy(),
    /** @param {RunInfo} run @param {RunDetail} detail */
    update(run, detail) {
      const hasCurve = detail.reward.count > 0;
      chart.element.hidden = !hasCurve && hasFailed(run);
      chart.show(detail);
      figures.replaceChildren(...figureRows(run, detail));
      const failureKey = hasFailed(run) ? `${detail.failure?.error ?? run.error}${detail.log.length}` : "";
      if (failureKey !== shownFailure) failure.replaceChildren(...(failureKey ? failureRows(run, detail, actions) : []));
      if (run.state !== shownState) buttons.replaceChildren(...actionButtons(run, actions));
      const latest = detail.samples[detail.samples.length - 1];
      const sampleKey = latest ? `${latest.step}:${latest.files.join()}` : "";
      if (sampleKey !== shownSample) sample.replaceChildren(...sampleRows(id, latest, actions));
      const fileKey = (run.files ?? []).join();
      if (fileKey !== shownFiles) files.replaceChildren(...fileRows(run.files ?? [], actions));
      [shownSample, shownFiles, shownState, shownFailure] = [sampleKey, fileKey, run.state, failureKey];
    },
  };
}

/**
 * @param {RunInfo} run
 * @param {RunDetail} detail
 * @returns {HTMLElement[]}
 */
function figureRows(run, detail) {
  /** @type {Array<[string, string]>} */
  const rows = [];
  if (run.ended) rows.push(["Ended", run.ended]);
  const { started, heldOutSpan } = detail;
  if (started?.reward) rows.push(["Reward model", started.reward]);
  if (started?.experts?.length) rows.push(["Expert", started.experts.join(", ")]);
  if (started?.clips) {
    const isPicked = started.clips < started.clips_offered;
    rows.push(["Clips", isPicked ? `${started.clips} of ${started.clips_offered}, picked by the reward` : String(started.clips)]);
  }
  if (started?.data_changed) rows.push(["Data", started.data_changed]);
  const measure = started?.measure ?? "reward";
  if (heldOutSpan) rows.push([`Held-out ${measure}`, `${heldOutSpan.first.toFixed(4)} → ${heldOutSpan.last.toFixed(4)}`]);
  if (heldOutSpan && heldOutSpan.base !== null) rows.push([measure === "reward" ? "Held-out, base model" : "Held-out, before training", heldOutSpan.base.toFixed(4)]);
  if (detail.secondsAStep) rows.push(["Speed", `${detail.secondsAStep < 10 ? detail.secondsAStep.toFixed(1) : Math.round(detail.secondsAStep)} s a step`]);
  if (detail.checkpoints.length) rows.push(["Checkpoint", `step ${detail.checkpoints[detail.checkpoints.length - 1]}`]);
  if (started?.parameters) rows.push(["Trained", `${(started.parameters / 1e6).toFixed(started.parameters < 1e7 ? 2 : 0)} M parameters`]);
  if (started?.device) rows.push(["Device", started.device]);
  return rows.flatMap(([term, value]) => [el("dt", { text: term }), el("dd", { text: value })]);
}

/**
 * @param {RunInfo} run
 * @param {Actions} actions
 * @returns {HTMLElement[]}
 */
function actionButtons(run, actions) {
  if (!isLive(run)) return [];
  const isStopping = run.state === "stopping";
  const stop = el("button", { class: "rl-button rl-stop", type: "button", disabled: isStopping }, [
    icon(isStopping ? "spin pi-spinner" : "stop-circle"),
    el("span", { text: isStopping ? "Saving and stopping" : "Stop" }),
  ]);
  stop.addEventListener("click", () => actions.stop(run));
  return [stop];
}

/**
 * @param {string} id
 * @param {{ step: number, files: string[], prompts: string[] } | undefined} latest
 * @param {Actions} actions
 * @returns {HTMLElement[]}
 */
function sampleRows(id, latest, actions) {
  if (!latest?.files.length) return [];
  const title = latest.prompts.join("\n");
  const isVideo = (/** @type {string} */ file) => /\.(mp4|webm)$/i.test(file);
  // Videos first: motion is what a strip of frames hides.
  const media = [...latest.files]
    .sort((a, b) => Number(isVideo(b)) - Number(isVideo(a)))
    .map((file) => {
      const src = actions.fileUrl(id, file);
      if (isVideo(file)) return el("video", { src, title, muted: true, loop: true, autoplay: true, playsinline: true });
      return el("img", { src, title, alt: title || `Sample of step ${latest.step}` });
    });
  for (const item of media) if (item instanceof HTMLVideoElement) item.muted = true; // the attribute alone does not allow autoplay
  return [el("figcaption", { class: "rl-heading", text: `${latest.files[0].includes("validation-") ? "Validation" : "Sample"} at step ${latest.step}` }), el("div", { class: "rl-sample-grid" }, media)];
}

/**
 * @param {string[]} files
 * @param {Actions} actions
 * @returns {HTMLElement[]}
 */
function fileRows(files, actions) {
  if (!files.length) return [];
  // The same file lies in the run's folder and among the LoRAs: one line for both.
  const byName = new Map(files.map((path) => [path.slice(Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1), path]));
  const rows = [...byName].map(([name, path]) => {
    const copy = el("button", { class: "rl-icon-button", type: "button", title: "Copy the file name", "aria-label": `Copy ${name}` }, [icon("copy")]);
    copy.addEventListener("click", () => actions.copy(name));
    return el("div", { class: "rl-file-row", title: path }, [icon("file"), el("span", { class: "rl-file-row-name", text: name }), copy]);
  });
  return [el("div", { class: "rl-heading", text: rows.length > 1 ? "Files" : "File" }), ...rows];
}

/**
 * @param {RunInfo} run
 * @param {RunDetail} detail
 * @param {Actions} actions
 * @returns {HTMLElement[]}
 */
function failureRows(run, detail, actions) {
  const error = detail.failure?.error ?? run.error ?? "The training process ended without a word.";
  /** @type {HTMLElement[]} */
  const rows = [el("div", { class: "rl-failure-head" }, [icon("exclamation-triangle"), el("span", { text: error })])];
  if (detail.log.length) {
    const copy = el("button", { class: "rl-button", type: "button" }, [icon("copy"), el("span", { text: "Copy log" })]);
    copy.addEventListener("click", () => actions.copy(detail.log.join("\n")));
    rows.push(el("div", { class: "rl-heading", text: "Last lines of its log" }), el("pre", { class: "rl-log", text: detail.log.slice(-30).join("\n") }), copy);
  }
  return rows;
}
