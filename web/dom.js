// @ts-check
/** Small DOM helpers. Data only ever enters the page as text or as attribute values, never as markup. */

/**
 * Create an element.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} [props] `class`, `text`, `on` (event name -> listener), `data` (dataset), `style` (object); the rest become attributes.
 * @param {Array<Node | null | undefined>} [children]
 * @returns {HTMLElementTagNameMap[K]}
 */
export function el(tag, props = {}, children = []) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = String(value);
    else if (key === "text") node.textContent = String(value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key === "style") Object.assign(node.style, value);
    else if (key === "on") {
      for (const [name, listener] of Object.entries(/** @type {Record<string, EventListener>} */ (value))) node.addEventListener(name, listener);
    } else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children) if (child) node.append(child);
  return node;
}

/**
 * An icon of the PrimeIcons font that the front-end ships.
 *
 * @param {string} name icon name without the `pi-` prefix
 * @returns {HTMLElement}
 */
export function icon(name) {
  return el("i", { class: `pi pi-${name}`, "aria-hidden": "true" });
}

/**
 * Set text only when it changed, so that a selection inside it survives updates.
 *
 * @param {HTMLElement} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Call `task` at most once per animation frame.
 *
 * @param {() => void} task
 * @returns {{ request(): void, cancel(): void }}
 */
export function onceAFrame(task) {
  let handle = 0;
  return {
    request() {
      if (!handle) {
        handle = requestAnimationFrame(() => {
          handle = 0;
          task();
        });
      }
    },
    cancel() {
      if (handle) cancelAnimationFrame(handle);
      handle = 0;
    },
  };
}

/**
 * Keep pointer work inside a node's widget from also moving, selecting or zooming the graph.
 *
 * @param {HTMLElement} root
 */
export function shieldFromCanvas(root) {
  for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) root.addEventListener(name, (event) => event.stopPropagation());
}

/**
 * Add the pack's style sheet to the page, once.
 *
 * @param {string} href
 */
export function addStyleSheet(href) {
  if ([...document.styleSheets].some((sheet) => sheet.href === href)) return;
  document.head.append(el("link", { rel: "stylesheet", href }));
}
