// @ts-check
/** Registers the pack with the front-end. The only module with effects on import. */
import { addStyleSheet } from "./dom.js";
import { after, hide, widgetOf } from "./graph_node.js";
import * as host from "./host.js";
import { addMix, addRewardKind, addRows, addRun, addText } from "./node_kinds.js";
import { mount, reveal } from "./panel.js";
import { RunStore } from "./run_store.js";

const TAB_ID = "reward-lab";
/** Later ones use what earlier ones define. */
const STYLES = ["base", "panel", "lora_rows", "file_picker", "nodes", "label_page"];
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
/** Height of the axes' text, about six lines. */
const AXES_MAX_PX = 130;

const store = new RunStore(host);

/** @typedef {import("./node_kinds.js").NodeView} NodeView */
/** @type {WeakMap<object, NodeView[]>} */
const viewsOf = new WeakMap();

/** @param {string} id of the run that the sidebar is to show */
function showRun(id) {
  reveal(store, id);
  host.showSidebarTab(TAB_ID);
}

/**
 * @param {any} node
 * @param {any} output the node's `ui` payload
 * @param {boolean} isExecution whether the node ran just now
 */
function showOutput(node, output, isExecution) {
  for (const view of viewsOf.get(node) ?? []) {
    view.onOutput(output ?? {});
    if (isExecution) view.onExecuted?.(output ?? {});
  }
}

host.registerExtension({
  name: "RewardLab",

  setup() {
    for (const name of STYLES) addStyleSheet(new URL(`./styles/${name}.css`, import.meta.url).href);
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
      RUN_NODES.includes(kind) ? addRun(node, store, showRun) : null,
      kind === REWARD_NODE ? addRewardKind(node) : null,
      kind === MIX_NODE ? addMix(node) : null,
      TEXT_NODES.includes(kind) ? addText(node) : null,
    ].filter((view) => view !== null);
    if (!views.length) return;
    viewsOf.set(node, views);
    after(node, "onExecuted", (output) => showOutput(node, output, true));
  },

  /** Called when a workflow comes back to the front: outputs are there again without an execution. */
  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = host.nodeById(id);
      if (node) showOutput(node, output, false);
    }
  },
});
