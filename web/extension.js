// @ts-check
/** Registers the pack with the front-end. The only module with effects on import. */
import { addStyleSheet } from "./dom.js";
import * as host from "./host.js";
import { chooseOfficial, convertLayout } from "./lora_actions.js";
import { createRowsView } from "./lora_rows.js";
import { createRunView, createTextView } from "./node_views.js";
import { filledValues, hiddenWidgets } from "./mix_rows.js";
import { mount, reveal } from "./panel.js";
import { describeChoice, widgetLabels } from "./reward_kind.js";
import { RunStore } from "./run_store.js";
import { wrappedLines } from "./text_lines.js";

const TAB_ID = "reward-lab";
const ROWS_NODES = ["RewardLabLoadLoRAs", "RewardLabMergeLoRA"];
const RUN_NODES = ["RewardLabTrainLoRA", "RewardLabTrainPAVRM"];
const CELL_NODE = "RewardLabTestLabCell";
const GRID_NODE = "RewardLabTestLabGrid";
const REWARD_NODE = "RewardLabRewardModel";
const MIX_NODE = "RewardLabMixRewards";
const TEXT_NODES = [
  "RewardLabDataset",
  "RewardLabInspectLoRA",
  "RewardLabMemoryPlan",
  "RewardLabMergeLoRA",
  "RewardLabSampleWan22",
  "RewardLabScoreLatent",
  "RewardLabScoreVideo",
  "RewardLabTestLabCell",
  "RewardLabTestLabGrid",
  "RewardLabRunResult",
];
/** Room for a LoRA's name beside two strengths. */
const ROWS_WIDTH_PX = 580;
/** A node this much higher than its rows still counts as fitted. */
const SNUG_PX = 4;
/** Height of the axes' text, about six lines. */
const AXES_MAX_PX = 130;
/** Name that the front-end gives to the text that a node shows while it works. */
const PROGRESS_WIDGET = "$$node-text-preview";
/** Name of the property that keeps a node's run over a reload of the page. */
const RUN_PROPERTY = "reward_lab_run";

const store = new RunStore(host);

/** @typedef {{ onOutput(output: any): void }} NodeView */
/** @type {WeakMap<object, NodeView[]>} */
const viewsOf = new WeakMap();

/**
 * Add an element to a node as a widget that is saved nowhere.
 *
 * @param {any} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {() => number} height_px
 * @param {() => void} [onRemove]
 */
function addView(node, name, element, height_px, onRemove) {
  const widget = node.addDOMWidget(name, "reward_lab", element, {
    serialize: false,
    hideOnZoom: false,
    margin: 6,
    getMinHeight: height_px,
    getMaxHeight: height_px,
  });
  widget.serialize = false;
  const remove = widget.onRemove;
  widget.onRemove = () => {
    remove?.call(widget);
    onRemove?.();
  };
  return widget;
}

/**
 * @param {any} node
 * @param {string} name
 */
function widgetOf(node, name) {
  return node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
}

/**
 * Hide a widget in both ways of drawing nodes, or show it again; its value stays part of the workflow.
 *
 * @param {any} widget
 * @param {boolean} [isHidden]
 */
function hide(widget, isHidden = true) {
  widget.hidden = isHidden;
  widget.options.hidden = isHidden;
}

/**
 * Let a node be as high as its widgets need; never smaller than the user made it.
 *
 * @param {any} node
 */
function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  host.redrawGraph();
}

/**
 * @param {any} node
 * @returns {NodeView | null}
 */
function addRows(node) {
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
  const configured = node.onConfigure;
  node.onConfigure = function (/** @type {unknown[]} */ ...args) {
    configured?.apply(this, args);
    isConfigured = true;
    view.refresh();
  };
  node.setSize([Math.max(node.size[0], ROWS_WIDTH_PX), node.size[1]]);
  return { onOutput: (output) => output.reward_lab_rows && view.setReports(output.reward_lab_rows) };
}

/**
 * @param {any} node
 * @returns {NodeView & { show(text: string, page?: { label: string, url: string } | null): void }}
 */
function addText(node) {
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
 * @param {any} node
 * @param {string} name of an input, or of a widget that can be one
 * @returns {boolean}
 */
function isConnected(node, name) {
  return Boolean(node.inputs?.some((/** @type {any} */ input) => (input.widget?.name ?? input.name) === name && input.link != null));
}

/**
 * Show of Mix Rewards the numbers of connected rewards only, and fill in what a run measured on base videos.
 *
 * @param {any} node
 * @returns {NodeView}
 */
function addMix(node) {
  const text = addText(node);
  const render = (/** @type {boolean} */ isSnug) => {
    const hidden = hiddenWidgets((name) => isConnected(node, name), Boolean(widgetOf(node, "measure_baseline")?.value));
    for (const [name, isHidden] of hidden) {
      const widget = widgetOf(node, name);
      if (widget) hide(widget, isHidden);
    }
    if (isSnug) node.setSize([node.size[0], node.computeSize()[1]]);
    else fit(node);
  };
  const measure = widgetOf(node, "measure_baseline");
  const changed = measure?.callback;
  if (measure)
    measure.callback = function (/** @type {unknown[]} */ ...args) {
      changed?.apply(this, args);
      render(true);
    };
  for (const name of ["onConfigure", "onConnectionsChange"]) {
    const previous = node[name];
    node[name] = function (/** @type {unknown[]} */ ...args) {
      previous?.apply(this, args);
      render(false);
    };
  }
  render(true);
  return {
    onOutput(output) {
      text.onOutput(output);
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
function addRewardKind(node) {
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
    if (isSnug) node.setSize([node.size[0], node.computeSize()[1]]);
  };
  for (const name of ["kind", "file", "download"]) {
    const widget = widgetOf(node, name);
    const changed = widget?.callback;
    if (widget)
      widget.callback = function (/** @type {unknown[]} */ ...args) {
        changed?.apply(this, args);
        render(true);
      };
  }
  for (const name of ["onConfigure", "onConnectionsChange"]) {
    const previous = node[name];
    node[name] = function (/** @type {unknown[]} */ ...args) {
      previous?.apply(this, args);
      isConfigured ||= name === "onConfigure";
      render(false);
    };
  }
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
 * @param {any} node
 * @returns {NodeView}
 */
function addRun(node) {
  const view = createRunView(store, (id) => {
    reveal(store, id);
    host.showSidebarTab(TAB_ID);
  });
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
  const configured = node.onConfigure;
  node.onConfigure = function (/** @type {unknown[]} */ ...args) {
    configured?.apply(this, args);
    follow();
  };
  return {
    onOutput(output) {
      const id = output.reward_lab_run?.[0];
      if (!id) return;
      node.properties[RUN_PROPERTY] = id;
      follow();
    },
  };
}

/**
 * @param {any} node
 * @param {any} output the node's `ui` payload
 */
function showOutput(node, output) {
  for (const view of viewsOf.get(node) ?? []) view.onOutput(output ?? {});
}

host.registerExtension({
  name: "RewardLab",

  setup() {
    addStyleSheet(new URL("./panel.css", import.meta.url).href);
    /** @type {(() => void) | null} */
    let unmount = null;
    const leave = () => {
      unmount?.();
      unmount = null;
    };
    host.registerSidebarTab({
      id: TAB_ID,
      icon: "pi pi-chart-line",
      title: "Reward Lab",
      tooltip: "Reward Lab: training runs",
      type: "custom",
      render(/** @type {HTMLElement} */ element) {
        leave();
        unmount = mount(element, store, host);
      },
      destroy: leave,
    });
  },

  nodeCreated(/** @type {any} */ node) {
    const kind = node.constructor?.comfyClass ?? node.comfyClass;
    // A seed that starts as `fixed` makes the front-end call its control widget `fixed` as well.
    const control = widgetOf(node, "seed")?.linkedWidgets?.[0];
    if (control && kind?.startsWith("RewardLab")) control.label = "control after generate";
    const applied = kind === CELL_NODE ? widgetOf(node, "applied") : null;
    if (applied) hide(applied); // the sweep fills it in
    const axes = kind === GRID_NODE ? widgetOf(node, "axes") : null;
    if (axes) axes.options.getMaxHeight = () => AXES_MAX_PX; // the rest of the node is for the grid
    const views = [
      ROWS_NODES.includes(kind) ? addRows(node) : null,
      RUN_NODES.includes(kind) ? addRun(node) : null,
      kind === REWARD_NODE ? addRewardKind(node) : null,
      kind === MIX_NODE ? addMix(node) : null,
      TEXT_NODES.includes(kind) ? addText(node) : null,
    ].filter((view) => view !== null);
    if (!views.length) return;
    viewsOf.set(node, views);
    const executed = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      executed?.apply(this, arguments);
      showOutput(node, output);
    };
  },

  /** Called when a workflow comes back to the front: outputs are there again without an execution. */
  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = host.nodeById(id);
      if (node) showOutput(node, output);
    }
  },
});
