// @ts-check
/**
 * The only module that imports the ComfyUI front-end. It must sit at the web root: the two imports below are relative to
 * `/extensions/<folder>/`.
 */
// @ts-ignore served by the host, not part of the pack
import { api } from "../../scripts/api.js";
// @ts-ignore served by the host, not part of the pack
import { app } from "../../scripts/app.js";

/** @param {Record<string, unknown>} extension */
export function registerExtension(extension) {
  app.registerExtension(extension);
}

/** @param {Record<string, unknown>} tab */
export function registerSidebarTab(tab) {
  app.extensionManager.registerSidebarTab(tab);
}

/**
 * Open the sidebar tab of this id, or leave it open.
 *
 * @param {string} id
 */
export function showSidebarTab(id) {
  const sidebar = app.extensionManager.sidebarTab;
  if (sidebar && sidebar.activeSidebarTabId !== id) sidebar.toggleSidebarTab(id);
}

/**
 * GET a route of the pack.
 *
 * @param {string} path starts with `/reward_lab/`
 * @returns {Promise<any>} parsed JSON, or the text of a route that answers with text
 * @throws {Error} with the server's own message when the answer is not 2xx
 */
export async function getJson(path) {
  return readJson(await api.fetchApi(path, { cache: "no-store" }), path);
}

/**
 * POST to a route of the pack.
 *
 * @param {string} path starts with `/reward_lab/`
 * @param {unknown} [body] sent as JSON
 * @returns {Promise<any>}
 * @throws {Error} with the server's own message when the answer is not 2xx
 */
export async function postJson(path, body) {
  const content = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  return readJson(await api.fetchApi(path, { method: "POST", ...content }), path);
}

/**
 * @param {Response} response
 * @param {string} path
 */
async function readJson(response, path) {
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  const body = isJson ? await response.json() : await response.text();
  if (!response.ok) throw new Error(`${path}: ${(isJson && body?.error) || `the server answered ${response.status} ${response.statusText}`}`);
  return body;
}

/**
 * Address of a file route, for `<img>` and `<video>`.
 *
 * @param {string} path
 * @returns {string}
 */
export function fileUrl(path) {
  return api.apiURL(path);
}

/**
 * Listen to a websocket event of the server.
 *
 * @param {string} name
 * @param {(detail: any) => void} listener
 * @returns {() => void} call it to stop listening
 */
export function onServerEvent(name, listener) {
  const handler = (/** @type {CustomEvent} */ event) => listener(event.detail);
  api.addEventListener(name, handler);
  return () => api.removeEventListener(name, handler);
}

/**
 * Ask a yes/no question in the front-end's own dialog.
 *
 * @param {string} title
 * @param {string} message
 * @returns {Promise<boolean>}
 */
export async function confirm(title, message) {
  return (await app.extensionManager.dialog.confirm({ title, message })) === true;
}

/**
 * @param {"success" | "info" | "warn" | "error"} severity
 * @param {string} summary
 * @param {string} [detail]
 */
export function toast(severity, summary, detail = "") {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 8000 : 4000 });
}

/** Redraw the graph canvas after a widget changed size. */
export function redrawGraph() {
  app.graph?.setDirtyCanvas(true, true);
}

/**
 * The node of the root graph that an output belongs to.
 *
 * @param {string} locatorId
 * @returns {any}
 */
export function nodeById(locatorId) {
  return app.graph?.getNodeById(locatorId) ?? null;
}
