"""wandb without a crash, a question or a wait: online where a key is found and the server answers,
offline otherwise."""

import netrc
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from minimind.common.errors import first_line
from minimind.common.language import say
from minimind.common.launch import is_main_process

PROBE_SECONDS = 5
PROJECT = "minimind"


def has_key(host: str) -> bool:
    """Whether wandb will find a login for `host`: $WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    home = os.path.expanduser("~")  # noqa: PTH111, Path raises where there is none
    path = Path(os.environ.get("NETRC") or Path(home) / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_answers(host: str, port: int) -> bool:
    """Whether a connection to the server opens within a few seconds, name lookup included."""
    opened = threading.Event()

    def connect():
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            opened.set()
        except OSError:
            return

    # A name lookup has no time-out of its own
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return opened.is_set()


def offline_reason() -> str | None:
    """Why wandb must run offline, or None if it can be online."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    if not has_key(url.hostname):
        return "no wandb key was found"
    if not server_answers(url.hostname, url.port or (443 if url.scheme == "https" else 80)):
        return f"{url.hostname} does not answer"
    return None


def open_wandb_run(stage) -> None:
    """Open the run of a stage, grouped with the other stages of its pipeline, and print where it
    is."""
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    if not is_main_process():
        return
    import wandb

    # A killed run keeps all but its last second; by default it loses up to 15.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    settings = wandb.Settings(init_timeout=30, silent=True, x_file_stream_transmit_interval=1)
    options = {
        "project": os.environ["WANDB_PROJECT"],
        "name": os.environ.get("WANDB_NAME") or stage.args.run_name,
        "group": os.environ.get("WANDB_RUN_GROUP") or stage.lineage["pipeline"],
        "job_type": stage.name,
        "config": {"stage": stage.name, **stage.lineage},
        "id": stage.run["run"],  # a resumed stage continues its run
        "resume": "allow",
        "settings": settings,
    }
    mode = os.environ.get("WANDB_MODE")
    if mode is None and (reason := offline_reason()):
        mode = "offline"
        say(f"wandb: offline, because {reason}")
    try:
        run = wandb.init(**options, mode=mode)
    except Exception as error:  # the key is refused, or the server fails midway
        say(f"wandb: offline, because the server refused the run: {first_line(error)}")
        run = wandb.init(**options, mode="offline")
    if run.settings.mode in ("offline", "dryrun"):
        directory = Path(run.settings.sync_dir)
        say(f"wandb: look at the run now    wandb leet {directory}")
        say(f"wandb: upload it later        wandb sync {directory}")
    else:
        say(f"wandb: {run.url}")


def log_samples(wandb, rows: Sequence[dict], step: int) -> None:
    """Log all samples so far as a table."""
    if wandb.run is not None:
        columns = ["step", "prompt", "text"]
        table = wandb.Table(columns, [[row[name] for name in columns] for row in rows])
        wandb.log({"samples": table, "train/global_step": step})


def log_inspection(report: dict) -> None:
    """Log the report of `inspection.Inspection` as tables of its roles, windows and findings."""
    import wandb

    columns = ["tokens", "trained", "trained_share"]
    roles = [[role, *(facts[name] for name in columns)] for role, facts in report["roles"].items()]
    windows = report["lengths"]["windows"]
    fields = ["severity", "name", "count", "text", "advice"]
    findings = [
        [*(finding[name] for name in fields), ", ".join(finding["places"])]
        for finding in report["findings"]
    ]
    tables = {
        "inspection/roles": wandb.Table(["role", *columns], roles),
        "inspection/lengths": wandb.Table([*windows[0]], [[*row.values()] for row in windows]),
        "inspection/findings": wandb.Table([*fields, "places"], findings),
    }
    wandb.log(tables, commit=False)
