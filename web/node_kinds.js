// @ts-check
/** What each kind of node shows beyond its widgets. */
import { after, addView, fit, hide, isConnected, shrink, widgetOf } from "./graph_node.js";
import * as host from "./host.js";
import { chooseOfficial, convertLayout } from "./lora_actions.js";
import { createRowsView } from "./lora_rows.js";
import { filledValues, hiddenWidgets } from "./mix_rows.js";
import { createRunView, createTextView } from "./node_views.js";
import { describeChoice, widgetLabels } from "./reward_kind.js";
import { wrappedLines } from "./text_lines.js";

/** Room for a LoRA's name beside two strengths. */
const ROWS_WIDTH_PX = 580;
/** A node this much higher than its rows still counts as fitted. */
const SNUG_PX = 4;
/** Name that the front-end gives to the text that a node shows while it works. */
const PROGRESS_WIDGET = "$$node-text-preview";
/** Name of the property that keeps a node's run over a reload of the page. */
const RUN_PROPERTY = "reward_lab_run";

/**
 * @typedef {object} NodeView
 * @property {(output: any) => void} onOutput shows what a node returned; again when its workflow comes back to the front
 * @property {(output: any) => void} [onExecuted] does, besides, what only an execution may do: an output that comes back is old
 */

/**
 * The rows of LoRAs in place of the text that they are saved as.
 *
 * @param {any} node
 * @returns {NodeView | null}
 */
export function addRows(node) {
  const widget = widgetOf(node, "rows");
  if (!widget) return null;
  hide(widget);
  let height = 0;
  let isConfigured = false;
  const view = createRowsView({
    read: () => String(widget.value ?? ""),
    write: (text) => {
      widget.value = text;
      widget.callback?.(text);
    },
    listFiles: () => host.getJson("/reward_lab/loras"),
    onError: (message) => host.toast("error", "The LoRA files could not be listed", message),
    convert: (anchor, file, onDone) => void convertLayout(host, anchor, file, onDone),
    download: (anchor, onDone) => void chooseOfficial(host, anchor, onDone),
    onResize: (height_px) => {
      if (height_px === height) return;
      const [width, needed] = node.computeSize();
      const isSnug = height > 0 ? node.size[1] <= needed - (height_px - height) + SNUG_PX : !isConfigured;
      // A node that was as high as its rows stays so; one that the user made higher keeps its height while the rows fit in.
      if (isSnug) node.setSize([Math.max(node.size[0], width), needed]);
      height = height_px;
      fit(node);
    },
  });
  addView(
    node,
    "reward_lab_rows_view",
    view.element,
    () => view.height_px() + 12,
    () => view.destroy(),
  );
  after(node, "onConfigure", () => {
    isConfigured = true;
    view.refresh();
  });
  node.setSize([Math.max(node.size[0], ROWS_WIDTH_PX), node.size[1]]);
  return { onOutput: (output) => output.reward_lab_rows && view.setReports(output.reward_lab_rows) };
}

/**
 * What a node returned as text.
 *
 * @param {any} node
 * @returns {NodeView & { show(text: string, page?: { label: string, url: string } | null): void }}
 */
export function addText(node) {
  const view = createTextView();
  let lines = 0;
  const widget = addView(node, "reward_lab_text", view.element, () => (lines ? Math.min(10, lines) * 17 + 26 : 0));
  widget.hidden = true;
  const show = (/** @type {string} */ text, /** @type {{ label: string, url: string } | null} */ page = null) => {
    view.show(text, page);
    lines = wrappedLines(text, Math.max(24, node.size[0] / 6.6 - 2));
    widget.hidden = !text;
    fit(node);
  };
  return {
    show,
    onOutput(output) {
      if (!output.text) return;
      const text = [output.text].flat().join("\n");
      const report = output.reward_lab_sweep?.[0]?.report;
      // The front-end's own line of progress text says the same and would take the room of the grid.
      const progress = report ? widgetOf(node, PROGRESS_WIDGET) : null;
      if (progress) hide(progress);
      show(text, report ? { label: "Open report", url: host.fileUrl(report) } : null);
    },
  };
}

/**
 * Show of Mix Rewards the numbers of connected rewards only, and fill in what a run measured on base videos.
 *
 * @param {any} node
 * @returns {NodeView}
 */
export function addMix(node) {
  const text = addText(node);
  const render = (/** @type {boolean} */ isSnug) => {
    const hidden = hiddenWidgets((name) => isConnected(node, name), Boolean(widgetOf(node, "measure_baseline")?.value));
    for (const [name, isHidden] of hidden) {
      const widget = widgetOf(node, name);
      if (widget) hide(widget, isHidden);
    }
    if (isSnug) shrink(node);
    else fit(node);
  };
  const measure = widgetOf(node, "measure_baseline");
  if (measure) after(measure, "callback", () => render(true));
  for (const name of ["onConfigure", "onConnectionsChange"]) after(node, name, () => render(false));
  render(true);
  return {
    onOutput: text.onOutput,
    onExecuted(output) {
      for (const [name, value] of filledValues(output.reward_lab_baseline ?? [])) {
        const widget = widgetOf(node, name);
        if (widget && !isConnected(node, name)) widget.value = value;
      }
    },
  };
}

/**
 * Show of Load Reward Model what its kind reads; the rest is hidden, unless a link sets it.
 *
 * @param {any} node
 * @returns {NodeView}
 */
export function addRewardKind(node) {
  const text = addText(node);
  /** @type {import("./reward_kind.js").Catalogue | null} */
  let catalogue = null;
  let isConfigured = false;
  const value = (/** @type {string} */ name) => widgetOf(node, name)?.value;
  /** @param {string} name */
  const isLinked = (name) => isConnected(node, name);
  /** @param {boolean} isSnug the node gets as high as its widgets now need; else it only grows */
  const render = (isSnug) => {
    if (!catalogue) return;
    for (const [name, label] of widgetLabels(catalogue, isLinked("kind") ? null : value("kind"))) {
      const widget = widgetOf(node, name);
      if (!widget) continue;
      hide(widget, label === null && !isLinked(name));
      widget.label = label ?? name;
    }
    text.show(describeChoice(catalogue, { kind: isLinked("kind") ? "" : value("kind"), file: value("file"), download: Boolean(value("download")) }));
    if (isSnug) shrink(node);
  };
  for (const name of ["kind", "file", "download"]) {
    const widget = widgetOf(node, name);
    if (widget) after(widget, "callback", () => render(true));
  }
  after(node, "onConfigure", () => (isConfigured = true));
  for (const name of ["onConfigure", "onConnectionsChange"]) after(node, name, () => render(false));
  const load = (/** @type {() => void} */ onLoad) =>
    host.getJson("/reward_lab/reward_models").then(
      (answer) => {
        catalogue = answer;
        onLoad();
      },
      (error) => host.toast("error", "The reward models could not be listed", error.message),
    );
  void load(() => render(!isConfigured));
  return {
    onOutput(output) {
      text.onOutput(output);
      void load(() => {}); // a run may have fetched a file; what the node says now is the run's own report
    },
  };
}

/**
 * The run that a node started or waits for.
 *
 * @param {any} node
 * @param {import("./run_store.js").RunStore} store
 * @param {(id: string) => void} onOpen the user wants to see the run in the sidebar
 * @returns {NodeView}
 */
export function addRun(node, store, onOpen) {
  const view = createRunView(store, onOpen);
  addView(
    node,
    "reward_lab_run_view",
    view.element,
    () => 136,
    () => view.destroy(),
  );
  const follow = () => {
    const id = node.properties?.[RUN_PROPERTY];
    if (id && id !== view.runId()) view.follow(id);
  };
  after(node, "onConfigure", follow);
  return {
    onOutput(output) {
      const id = output.reward_lab_run?.[0];
      if (!id) return;
      node.properties[RUN_PROPERTY] = id;
      follow();
    },
  };
}

