"""wandb: never a crash, a question or a wait."""

import os
import socket
import threading
from types import SimpleNamespace

import pytest
from pipeline import PATIENCE, free_port

from minimind.training import tracking, wandb_tracking
from minimind.training.wandb_tracking import has_key, offline_reason


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_RUN_GROUP",
        "WANDB_NAME",
        "WANDB_BASE_URL",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


def test_without_a_key_wandb_is_offline(no_login):
    assert offline_reason() == "no wandb key was found"


def test_a_key_in_netrc_is_found(no_login):
    (no_login / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key("api.wandb.ai")
    assert not has_key("other.host")


def test_a_key_without_a_server_that_answers_is_offline(no_login, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    assert offline_reason() == "127.0.0.1 does not answer"


def test_an_endless_name_lookup_does_not_delay_the_run(no_login, monkeypatch):
    looking, ended = threading.Event(), threading.Event()

    def look_up(*address, timeout):
        looking.set()
        ended.wait(PATIENCE)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    monkeypatch.setattr(wandb_tracking, "PROBE_SECONDS", 0.1)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert offline_reason() == "api.wandb.ai does not answer"
    assert looking.wait(PATIENCE)
    ended.set()


def test_a_server_that_answers_is_online(no_login, monkeypatch):
    monkeypatch.setattr(wandb_tracking, "PROBE_SECONDS", PATIENCE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert offline_reason() is None


def test_a_run_without_a_key_is_written_offline_and_the_next_commands_are_printed(no_login, capsys):
    import wandb

    stage = SimpleNamespace(
        name="sft",
        args=SimpleNamespace(report_to=["wandb"], run_name=None),
        output_dir=no_login / "sft",
        lineage={"parent": {"weights": "abc"}, "pipeline": "pipeline-1"},
        run={"run": "0a1b2c3d"},
    )
    tracking.start_tracking(stage)
    try:
        assert wandb.run.group == "pipeline-1"
        assert wandb.run.job_type == "sft"
        assert wandb.run.config["parent"]["weights"] == "abc"
    finally:
        wandb.finish()
    output = capsys.readouterr().out
    assert "offline, because no wandb key was found" in output
    assert "wandb leet" in output
    assert "wandb sync" in output
    assert list((no_login / "wandb").glob("offline-run-*/*.wandb"))


def test_without_wandb_in_report_to_nothing_is_started(no_login):
    tracking.start_tracking(SimpleNamespace(args=SimpleNamespace(report_to=[])))
    assert not (no_login / "wandb").exists()
    assert "WANDB_MODE" not in os.environ
