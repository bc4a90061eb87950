"""A small client of ComfyUI's HTTP API: queue a prompt in API form, wait for it, fetch what it made."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

JSON_TYPE = {"Content-Type": "application/json"}


class PromptFailed(RuntimeError):
    """The server refused a prompt or a node of it failed; the text names the node and the reason."""


class Client:
    """Talks to one server.

    Args:
        url: its address, such as http://127.0.0.1:8188.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex
        # The server is this machine's own: a proxy of the environment must not come between.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch(self, path: str, *, data: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None, limit_s: float = 120.0) -> bytes:
        """One request; returns the body. Raises urllib.error.HTTPError for a status of 400 and above."""
        request = urllib.request.Request(self.url + path, data=data, headers=headers or {}, method=method)
        with self._opener.open(request, timeout=limit_s) as response:
            return response.read()

    def get(self, path: str, *, limit_s: float = 120.0):
        """GET a JSON document."""
        return json.loads(self.fetch(path, limit_s=limit_s))

    def post(self, path: str, content: object = None, *, limit_s: float = 120.0):
        """POST a JSON document; returns the answer's, or None where it is empty."""
        body = self.fetch(path, data=json.dumps(content).encode(), headers=JSON_TYPE, method="POST", limit_s=limit_s)
        return json.loads(body) if body.strip() else None

    def queue(self, prompt: dict, *, extra_data: dict | None = None) -> str:
        """Queue a prompt in API form; returns its id.

        Raises:
            PromptFailed: the server's validation refused it.
        """
        content = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        try:
            answer = self.post("/prompt", content)
        except urllib.error.HTTPError as error:
            raise PromptFailed(f"the prompt was refused: {error.read().decode(errors='replace')}") from error
        if answer.get("node_errors"):
            raise PromptFailed(f"the prompt was refused in part: {json.dumps(answer['node_errors'])}")
        return answer["prompt_id"]

    def wait(self, prompt_id: str, *, limit_s: float = 300.0) -> dict:
        """Wait for a prompt's end; returns its history entry ("outputs" by node id, "status").

        Raises:
            PromptFailed: a node failed, or the prompt was interrupted.
            TimeoutError: it has not ended after `limit_s` seconds.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["completed"]:
                return entry
            if entry and entry["status"]["status_str"] == "error":
                raise PromptFailed(_reason(entry))
            time.sleep(0.2)
        raise TimeoutError(f"prompt {prompt_id} has not ended after {limit_s:.0f} s")

    def run(self, prompt: dict, *, extra_data: dict | None = None, limit_s: float = 300.0) -> dict[str, dict]:
        """Queue a prompt and wait; returns the outputs by node id."""
        return self.wait(self.queue(prompt, extra_data=extra_data), limit_s=limit_s)["outputs"]

    def wait_idle(self, *, limit_s: float = 300.0) -> None:
        """Wait until the queue is empty (a sweep queues prompts of its own)."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            queue = self.get("/queue")
            if not queue["queue_running"] and not queue["queue_pending"]:
                return
            time.sleep(0.2)
        raise TimeoutError(f"the queue is not empty after {limit_s:.0f} s")

    def output_file(self, entry: dict) -> bytes:
        """The bytes of a file that an output names as {"filename", "subfolder", "type"}."""
        query = urllib.parse.urlencode({key: entry.get(key, "") for key in ("filename", "subfolder", "type")})
        return self.fetch(f"/view?{query}")


def _reason(entry: dict) -> str:
    for kind, content in entry["status"].get("messages", []):
        if kind == "execution_error":
            trace = "".join(content.get("traceback", []))
            return f"node {content['node_id']} ({content['node_type']}): {content['exception_type']}: {content['exception_message']}\n{trace}"
        if kind == "execution_interrupted":
            return f"interrupted at node {content['node_id']} ({content['node_type']})"
    return json.dumps(entry["status"])
