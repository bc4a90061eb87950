#!/usr/bin/env python3
"""Reward Lab's one command line: `python lab.py demo | test | serve | train | plan | bench | preprocess | score | score-latent | lora | setup`.

Standard library only. It finds or fetches ComfyUI, makes a virtual environment where the running Python lacks something, and hands
over to the part that does the work. `labtools/` holds the machinery; here stand only the sub-commands.

A new sub-command is one function `run_NAME(options) -> exit status`, one `arguments_NAME(parser)` if it has any, and one line in COMMANDS.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)
INTERRUPTED = 130


def check_python(version=sys.version_info) -> None:
    """Stop with a clear sentence under a Python that is too old; must itself run under that Python."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SystemExit(
            "lab.py needs Python %d.%d or newer; this is Python %d.%d (%s).\nRun it with a newer one, for instance: python3.12 lab.py ..."
            % (OLDEST_PYTHON + tuple(version[:2]) + (sys.executable,))
        )


def prepare(options, *, with_tests=False):
    """Set up host and environment as the common options say."""
    from labtools.setup import prepare as prepare_setup

    return prepare_setup(options.comfyui, with_tests=with_tests, verbose=options.verbose)


def use_cpu(options) -> bool:
    """The device choice: what was asked for, else the CPU where no GPU is found."""
    from labtools.comfy_server import has_gpu

    return options.device == "cpu" if options.device else not has_gpu()


def launch(setup, options, module: str, arguments: list[str]) -> int:
    """Run `main` of a module of the pack in the environment; returns its exit status."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environ["COMFYUI_PATH"] = str(setup.host.path)
    environ["REWARD_LAB_CPU"] = "1" if use_cpu(options) else "0"
    return call([str(setup.python), str(ROOT / "labtools" / "launch.py"), module, *arguments], environ)


def call(command: list[str], environ=None) -> int:
    """Run a program in the foreground. Ctrl-C reaches it directly (same terminal); this process waits until it has ended in order."""
    process = subprocess.Popen(command, env=environ)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def running_server(setup, options, base: Path, *, port: int):
    """A ComfyUI with the pack and the pocket models, stopped at the end."""
    from labtools.base import make_base
    from labtools.comfy_server import require_port, start_server

    port = require_port(port, getattr(options, "listen", "127.0.0.1"))
    make_base(base)
    extra = [argument for argument in getattr(options, "host_arguments", []) if argument != "--"]
    listen = getattr(options, "listen", "127.0.0.1")
    server = start_server(setup.python, setup.host.path, base, port=port, cpu=use_cpu(options), listen=listen, extra=extra)
    try:
        yield server
    finally:
        server.stop()


def run_setup(options) -> int:
    """Fetch and install everything."""
    setup = prepare(options, with_tests=options.with_tests)
    print(f"ComfyUI {setup.host.version}: {setup.host.path} (from {setup.host.origin})\nPython: {setup.python}")
    return 0


def run_serve(options) -> int:
    """Start ComfyUI and stay until Ctrl-C or until it ends."""
    from labtools.comfy_server import log_tail, require_port

    # A taken port is told before the minutes that a fresh set-up takes.
    require_port(options.port, options.listen)
    setup = prepare(options)
    base = Path(options.base).expanduser().absolute() if options.base else setup.cache.base
    print("Starting ComfyUI ...", flush=True)
    with running_server(setup, options, base, port=options.port) as server:
        print(f"ComfyUI with Reward Lab: {server.url}\nTemplates: menu > Browse Templates > reward_lab. Log: {server.log}. Stop: Ctrl-C.", flush=True)
        try:
            while server.is_running():
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("\nStopping.")
            return 0
    print(f"ComfyUI ended with exit status {server.process.returncode}. Its last lines:\n{log_tail(server.log)}", file=sys.stderr)
    return 1


def run_demo(options) -> int:
    """Run the three example workflows in a real server and write what came of it."""
    setup = prepare(options)
    out = Path(options.out).expanduser().absolute()
    base = setup.cache.root / "demo-base"
    print("Starting ComfyUI ...", flush=True)
    with running_server(setup, options, base, port=0) as server:
        arguments = ["--server", server.url, "--base", str(base), "--out", str(out), "--seed", str(options.seed)]
        return launch(setup, options, "pocket.demo", arguments + options.rest)


def run_test(options) -> int:
    """Run ruff and pytest (all marks); everything after `--` goes to pytest."""
    setup = prepare(options, with_tests=True)
    status = 0
    if not options.only_pytest:
        status = call([str(setup.python), "-m", "ruff", "check", str(ROOT)])
        if status:
            print("ruff found faults (above); the tests run all the same.", flush=True)
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) and not os.environ.get("REWARD_LAB_CHROMIUM"):
        print("No Chromium found: browser tests cannot run. Install it (Debian, Ubuntu: sudo apt install chromium) or set REWARD_LAB_CHROMIUM.", flush=True)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environ |= {"COMFYUI_PATH": str(setup.host.path), "REWARD_LAB_PYTHON": str(setup.python)}
    command = [str(setup.python), "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    rest = [argument for argument in options.rest if argument != "--"]
    return call(command + (rest or [str(ROOT / "tests")]), environ) or status


def run_train(options) -> int:
    """Train from a config file in the foreground; Ctrl-C asks the run to stop in order."""
    if options.schema:
        with contextlib.redirect_stdout(sys.stderr):
            setup = prepare(options)
        return launch(setup, options, "lora_train.config_schema", [])
    config = Path(options.config)
    if not config.is_dir():
        from labtools.configs import read_config

        # Wrong settings are told before a set-up that takes minutes.
        read_config(config)
    setup = prepare(options)
    output = Path(options.output).expanduser().absolute() if options.output else setup.cache.base / "output"
    return launch(setup, options, "labtools.training", [str(config.absolute()), "--output", str(output)])


def run_plan(options) -> int:
    """Print what a training run would need: memory, seconds, knobs (`--json --shape wan-14b --card "rtx 4090"`; needs no weights and no GPU)."""
    from labtools.configs import read_config

    # A named shape stands for the files: they need not exist.
    values = read_config(Path(options.config), with_files=not any(argument.startswith("--shape") for argument in options.rest))
    with contextlib.redirect_stdout(sys.stderr):
        setup = prepare(options)
    # The plan reads a file; this one has its relative paths looked up.
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.json"
        resolved.write_text(json.dumps(values), encoding="utf-8")
        return launch(setup, options, "lora_train.plan", [str(resolved), *options.rest])


def run_bench(options) -> int:
    """Measure what is named; without a name, print the table of all committed results."""
    if options.what == "table":
        # The table alone stands on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            setup = prepare(options)
        return launch(setup, options, BENCHMARKS[options.what], options.rest)
    return launch(prepare(options), options, BENCHMARKS[options.what], options.rest)


def run_score(options) -> int:
    """Score pictures, videos, folders or frame tensors with a reward model."""
    from labtools.scoring import job

    # Standard output belongs to the scores alone: it may be read as one JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        setup = prepare(options)
    return launch(setup, options, "host.score_command", job(options, setup.cache.root))


def run_score_latent(options) -> int:
    """Score noisy latents with a PAVRM."""
    return run_score(options)


def arguments_score(parser) -> None:
    from labtools.scoring import arguments_score as add

    add(parser)


def arguments_score_latent(parser) -> None:
    from labtools.scoring import arguments_score_latent as add

    add(parser)


def run_pavrm_lora(options) -> int:
    """Store a PAVRM as a LoRA over a generator's first blocks."""
    return run_score(options)


def arguments_pavrm_lora(parser) -> None:
    from labtools.scoring import arguments_pavrm_lora as add

    add(parser)


def run_lora(options) -> int:
    """Look into, apply, convert, merge, extract or download LoRA files; `lab.py lora VERB --help` tells more."""
    # Programs read the one JSON object on standard output; what the set-up has to say goes elsewhere.
    with contextlib.redirect_stdout(sys.stderr):
        setup = prepare(options)
    arguments = [options.verb, *options.rest]
    if options.verb == "download" and not any(argument.split("=")[0] == "--to" for argument in options.rest):
        # The fetched ComfyUI runs on a base folder of its own; the user's own keeps its models beside its code.
        is_fetched = setup.host.path.is_relative_to(setup.cache.root)
        arguments += ["--to", str((setup.cache.base if is_fetched else setup.host.path) / "models" / "loras")]
    return launch(setup, options, "host.lora_command", arguments)


def run_preprocess(options) -> int:
    """Encode a folder of videos (or a sweep's cells) into a dataset: latents, text embeddings, previews to label."""
    from labtools.preprocessing import job

    with contextlib.redirect_stdout(sys.stderr):
        setup = prepare(options)
    return launch(setup, options, "host.preprocess_command", job(options))


def arguments_preprocess(parser) -> None:
    from labtools.preprocessing import arguments_preprocess as add

    add(parser)


def arguments_setup(parser) -> None:
    parser.add_argument("--with-tests", action="store_true", help="also install pytest, ruff and playwright")


def arguments_serve(parser) -> None:
    parser.add_argument("--port", type=int, default=8188, help="TCP port; 0 picks a free one (default: 8188)")
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--base", help="ComfyUI base directory: models, input, output (default: .lab/base)")
    parser.add_argument("host_arguments", nargs=argparse.REMAINDER, help="after --: further arguments for ComfyUI's main.py")


def arguments_demo(parser) -> None:
    parser.add_argument("--out", default="demo_out", help="folder for the results (default: demo_out)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def arguments_test(parser) -> None:
    parser.add_argument("--only-pytest", action="store_true", help="leave out ruff")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="after --: arguments for pytest (default: all tests)")


def arguments_train(parser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="training config, a JSON file; or the folder of an earlier run, which then goes on")
    what.add_argument("--schema", action="store_true", help="print the JSON Schema of such a file")
    parser.add_argument("--output", help="output folder; the run goes to <output>/reward_lab/runs (default: .lab/base/output, where `serve` shows it)")


def arguments_plan(parser) -> None:
    parser.add_argument("config", help="training config, a JSON file")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def arguments_bench(parser) -> None:
    parser.add_argument("what", nargs="?", default="table", choices=list(BENCHMARKS), help="what to measure (default: none, print the table of results)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the benchmark")


def arguments_lora(parser) -> None:
    parser.add_argument("verb", choices=["inspect", "apply", "convert", "merge", "extract", "download"], help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the verb")


BENCHMARKS = {
    "table": "benchmarks.table",
    "against-peft": "benchmarks.against_peft",
    "gpu": "benchmarks.gpu.run_all",
    "pocket": "pocket.bench",
    "adversarial": "pocket.adversarial",
    "pavrm-lora": "pocket.pavrm_lora",
    "rewards": "benchmarks.rewards",
    "stability": "benchmarks.stability",
    "learning": "pocket.learning",
    "pavrm": "pocket.pavrm_bench",
    "gradients": "pocket.gradient_bench",
}

COMMANDS = {
    "demo": (run_demo, arguments_demo),
    "test": (run_test, arguments_test),
    "serve": (run_serve, arguments_serve),
    "train": (run_train, arguments_train),
    "plan": (run_plan, arguments_plan),
    "bench": (run_bench, arguments_bench),
    "lora": (run_lora, arguments_lora),
    "score": (run_score, arguments_score),
    "score-latent": (run_score_latent, arguments_score_latent),
    "pavrm-lora": (run_pavrm_lora, arguments_pavrm_lora),
    "preprocess": (run_preprocess, arguments_preprocess),
    "setup": (run_setup, arguments_setup),
}


def end_in_order(number, frame) -> None:
    """Handler of SIGTERM: unwinds the stack, so that what was started is stopped."""
    raise SystemExit(128 + number)


class Parser(argparse.ArgumentParser):
    """Tells a wrong call as a JSON object too, where `--json` was asked for; exit status 2 either way."""

    def error(self, message: str):  # noqa: D102
        if "--json" in sys.argv:
            print(json.dumps({"verdict": "refused", "reason": message}))
        super().error(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="lab.py", description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI (else COMFYUI_PATH, the one around the pack, or one that is fetched)")
        sub.add_argument("--verbose", action="store_true", help="show what the installers print")
        device = sub.add_mutually_exclusive_group()
        device.add_argument("--cpu", dest="device", action="store_const", const="cpu", help="run on the CPU (default where no GPU is found)")
        device.add_argument("--gpu", dest="device", action="store_const", const="gpu", help="run on the GPU (default where one is found)")
        add_arguments(sub)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run one sub-command; failures that are foreseen end with a message and a remedy, not with a traceback."""
    check_python()
    from labtools.errors import LabError

    options = parse(argv)
    # An ending by SIGTERM must run the same clean-up as one by Ctrl-C; else the server would stay behind.
    signal.signal(signal.SIGTERM, end_in_order)
    try:
        return COMMANDS[options.command][0](options)
    except LabError as error:
        print(f"\nError: {error.message}\n\n{error.remedy}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished steps are kept; run the same command to go on.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"\nError: The disk is full ({error.filename or error}).\n\nFree some space (a fresh set-up needs about 8 GB), or set REWARD_LAB_CACHE=PATH.",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
