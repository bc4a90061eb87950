"""Prints, as JSON, what is installed for the interpreter that runs it. Run with `-I`: `PYTHON -I probe.py [--files]`.

`--files` also looks for every file that the installed packages recorded, and names the packages that lost some.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys


def has_all_files(distribution: importlib.metadata.Distribution) -> bool:
    """Whether every recorded file exists; byte code is not counted, since Python removes and rebuilds it."""
    record = distribution.read_text("RECORD") or ""
    for line in record.splitlines():
        name = line.rsplit(",", 2)[0].strip('"')
        if name and not name.endswith(".pyc") and not os.path.exists(distribution.locate_file(name)):
            return False
    return True


def main() -> None:
    """Print {"python": [major, minor], "packages": {name: version}, "broken": [names]}."""
    packages, broken = {}, []
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if not name:
            broken.append(str(getattr(distribution, "_path", "a package without a name")))
            continue
        normal = re.sub(r"[-_.]+", "-", name).lower()
        # The first one found on the path is the one that would be imported.
        if normal in packages:
            continue
        packages[normal] = distribution.version
        if "--files" in sys.argv[1:] and not has_all_files(distribution):
            broken.append(normal)
    print(json.dumps({"python": list(sys.version_info[:2]), "packages": packages, "broken": broken}))


if __name__ == "__main__":
    main()
