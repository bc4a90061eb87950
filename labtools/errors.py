"""The one exception of `lab.py` that is shown to the user without a traceback, and the reading of installers' failures."""

from __future__ import annotations

import re

NETWORK_SIGNS = (
    "name resolution",
    "name or service not known",
    "nodename nor servname",
    "getaddrinfo failed",
    "dns error",
    "failed to establish a new connection",
    "connection refused",
    "connection reset",
    "network is unreachable",
    "no route to host",
    "timed out",
    "error sending request",
    "proxyerror",
    "could not connect",
    "max retries exceeded",
)
DISK_SIGNS = ("no space left on device", "errno 28", "os error 28", "not enough space on the disk", "disk quota exceeded")
UNAVAILABLE_SIGNS = ("no matching distribution found", "no solution found when resolving", "requires-python", "has no wheels with a matching python")

OFFLINE_REMEDY = (
    "Connect to the network, or name a mirror in PIP_INDEX_URL (pip) and UV_DEFAULT_INDEX (uv), and run the same command again: finished steps are kept.\n"
    "Without any network: start lab.py with the Python of an existing ComfyUI and give its folder (--comfyui PATH), "
    "or copy the .lab folder of a finished set-up from a machine with the same system and Python."
)


class LabError(Exception):
    """A failure the user can act on.

    Args:
        message: what happened, with the values concerned.
        remedy: what to do about it.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(f"{message}\n{remedy}")
        self.message = message
        self.remedy = remedy


def unreachable_hosts(output: str) -> list[str]:
    """Names of the servers an installer's output speaks of, in order, each once."""
    found = re.findall(r"https?://(?:[^/@\s'\"`]+@)?([^/\s'\"`)>]+)|host='([^']+)'", output)
    names = [address or host for address, host in found]
    return list(dict.fromkeys(names))


def explain_failure(doing: str, output: str, return_code: int) -> LabError:
    """Turn a failed installer run into an error with a remedy.

    Args:
        doing: the step in the user's words, such as "installing PyTorch".
        output: everything the installer printed.
        return_code: its exit status.
    """
    lowered = output.lower()
    tail = "\n".join("  " + line for line in output.strip().splitlines()[-12:])
    # The disk comes first: pip reports a full disk during a download with network words around it.
    if any(sign in lowered for sign in DISK_SIGNS):
        return LabError(
            f"The disk became full while {doing}. The installer's last lines:\n{tail}",
            remedy="Free some space (a fresh set-up needs about 8 GB), or put the cache on another disk with REWARD_LAB_CACHE=PATH, and run again.",
        )
    if any(sign in lowered for sign in NETWORK_SIGNS):
        hosts = ", ".join(unreachable_hosts(output)) or "the package index"
        return LabError(f"No network: could not reach {hosts} while {doing}. The installer's last lines:\n{tail}", remedy=OFFLINE_REMEDY)
    if any(sign in lowered for sign in UNAVAILABLE_SIGNS):
        return LabError(
            f"A package has no build for this Python or system ({doing}). The installer's last lines:\n{tail}",
            remedy="Use Python 3.10 to 3.13 (64 bit), for instance: python3.12 lab.py ...",
        )
    return LabError(
        f"The installer failed with exit status {return_code} while {doing}. Its last lines:\n{tail}", remedy="Run again with --verbose to see all of it."
    )
