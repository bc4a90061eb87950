// @ts-check
/** What the pack does to the front-end's nodes and widgets, however they are drawn. */
import * as host from "./host.js";

/**
 * Add an element to a node as a widget that is saved nowhere.
 *
 * @param {any} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {() => number} height_px
 * @param {() => void} [onRemove]
 */
export function addView(node, name, element, height_px, onRemove) {
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
export function widgetOf(node, name) {
  return node.widgets?.find((/** @type {any} */ widget) => widget.name === name);
}

/**
 * Hide a widget in both ways of drawing nodes, or show it again; its value stays part of the workflow.
 *
 * @param {any} widget
 * @param {boolean} [isHidden]
 */
export function hide(widget, isHidden = true) {
  widget.hidden = isHidden;
  widget.options.hidden = isHidden;
}

/**
 * Let a node be as high as its widgets need; never smaller than the user made it.
 *
 * @param {any} node
 */
export function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  host.redrawGraph();
}

/**
 * @param {any} node
 * @param {string} name of an input, or of a widget that can be one
 * @returns {boolean}
 */
export function isConnected(node, name) {
  return Boolean(node.inputs?.some((/** @type {any} */ input) => (input.widget?.name ?? input.name) === name && input.link != null));
}

/**
 * Let a node be exactly as high as its widgets need.
 *
 * @param {any} node
 */
export function shrink(node) {
  node.setSize([node.size[0], node.computeSize()[1]]);
}

/**
 * Do something after every call of a method or callback of the front-end's object, which may have none yet.
 *
 * @param {any} target
 * @param {string} name
 * @param {(...args: any[]) => void} action gets the call's arguments
 */
export function after(target, name, action) {
  const previous = target[name];
  target[name] = function (/** @type {any[]} */ ...args) {
    const result = previous?.apply(this, args);
    action(...args);
    return result;
  };
}
