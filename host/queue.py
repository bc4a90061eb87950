"""Puts prompts into the server's own queue, as its `/prompt` route does, and reads what became of them.

Runs inside a node, which the host executes in its worker thread: the queue is thread-safe, and validation is awaited there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import execution
import nodes
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..testlab.sweep import ancestors

PASSED_ON = ("client_id", "preview_method", "extra_pnginfo", "comfy_usage_source")


@dataclass(frozen=True, kw_only=True)
class CheckedPrompt:
    """A prompt that the host accepts. `outputs` are the output nodes that will run; `sensitive` is what the host keeps out of its history."""

    prompt_id: str
    prompt: Mapping[str, Any]
    outputs: list[str]
    extra_data: dict[str, Any] = field(default_factory=dict)
    sensitive: dict[str, Any] = field(default_factory=dict)


def current_prompt_id() -> str | None:
    """Return the id of the prompt that is being executed; None outside of an execution."""
    context = get_executing_context()
    return context.prompt_id if context is not None else None


async def check(prompt: Mapping[str, Any], targets: Sequence[str]) -> CheckedPrompt:
    """Let the host validate a prompt.

    Args:
        prompt: API prompt.
        targets: Ids of the output nodes to run.

    Returns:
        The prompt with a new id and the sender of the prompt that is being executed, so that results reach the same page.

    Raises:
        ValueError: The host refuses the prompt; names the node and the reason.
    """
    prompt_id = str(uuid.uuid4())
    is_valid, error, outputs, node_errors = await execution.validate_prompt(prompt_id, prompt, list(targets))
    if not is_valid or set(outputs) != set(targets):
        raise ValueError(_refusal(prompt, error, node_errors))
    extra_data, sensitive = _sender()
    return CheckedPrompt(prompt_id=prompt_id, prompt=prompt, outputs=outputs, extra_data=extra_data, sensitive=sensitive)


def put(checked: CheckedPrompt) -> str:
    """Append a checked prompt to the queue and return its id."""
    server = PromptServer.instance
    number = server.number
    server.number += 1
    extra_data = {**checked.extra_data, "create_time": int(time.time() * 1000)}
    server.prompt_queue.put((number, checked.prompt_id, checked.prompt, extra_data, checked.outputs, dict(checked.sensitive)))
    return checked.prompt_id


def outputs_behind(prompt: Mapping[str, Any], node_id: str) -> list[str]:
    """Return a node and the output nodes that depend on it, such as a Save Video behind it."""
    behind = [other for other in prompt if other != node_id and node_id in ancestors(prompt, other)]
    return [node_id, *(other for other in behind if getattr(nodes.NODE_CLASS_MAPPINGS.get(prompt[other]["class_type"]), "OUTPUT_NODE", False))]


def waiting_ids() -> set[str]:
    """Return the ids of all prompts that run or wait, except the one that is being executed."""
    running, queued = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return {item[1] for item in (*running, *queued)} - {current_prompt_id()}


def failure_of(prompt_id: str) -> str:
    """Say why a prompt that has run left nothing behind, from the host's history."""
    entry = PromptServer.instance.prompt_queue.get_history(prompt_id=prompt_id).get(prompt_id)
    if entry is None:
        return "removed from the queue before it ran"
    for name, details in (entry.get("status") or {}).get("messages") or []:
        if name == "execution_error":
            return f"{details.get('node_type', 'a node')}: {str(details.get('exception_message', 'failed')).strip()}"
        if name == "execution_interrupted":
            return "cancelled"
    return "ran, but recorded nothing"


def show_text(node_id: str | None, text: str) -> None:
    """Show a line of progress on a node of the page that sent the prompt."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id:
        server.send_progress_text(text, node_id, server.client_id)


def blocked(count: int) -> tuple[ExecutionBlocker, ...]:
    """Return outputs that stop the nodes behind without an error."""
    return tuple(ExecutionBlocker(None) for _ in range(count))


def refused(message: str) -> ExecutionBlocker:
    """Return an output that makes the nodes behind fail with a message; nodes that do not use it run."""
    return ExecutionBlocker(message)


def _sender() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the executed prompt says about its sender, and what it keeps out of the history (keys for API nodes)."""
    own_id = current_prompt_id()
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    for item in running:
        if item[1] == own_id:
            return {name: item[3][name] for name in PASSED_ON if name in item[3]}, dict(item[5])
    return {}, {}


def _refusal(prompt: Mapping[str, Any], error: Any, node_errors: Mapping[str, Any]) -> str:
    """Put the host's answer into one line."""
    for node_id, problem in node_errors.items():
        for entry in problem.get("errors", []):
            title = (prompt.get(node_id, {}).get("_meta") or {}).get("title") or problem.get("class_type", "node")
            return f"{title} ({node_id}): {entry.get('message', 'invalid')} {entry.get('details', '')}".strip()
    details = error if isinstance(error, dict) else {}
    return f"{details.get('message', 'the host refuses the prompt')} {details.get('details', '')}".strip()
