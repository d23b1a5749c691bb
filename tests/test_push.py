"""`minimind push` against a stand-in of the Hub: what arrives, what stays, and what goes wrong."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from pipeline import failure, free_port, run_cli
from shared import make_stages
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind.sharing import CARD, Choices, plan_upload, write_model_card
from minimind.stage_directory import load_model

# Of huggingface_hub 2.4, which uses its HTTP library so
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_" + "Secret" * 6
REPO = "me/small-model"


class Hub(ThreadingHTTPServer):
    """The part of the Hub's HTTP interface that an upload uses, as huggingface_hub 2.4 calls it.

    `refusals` has the status and the message for requests whose path ends so.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.uploads, self.commits = [], {}, []
        self.repositories, self.refusals = {}, {}

    def files(self):
        """The files of the last commit by their names."""
        return self.commits[-1][2]


class Answer(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        for end, (status, message) in hub.refusals.items():
            if self.path.endswith(end):
                return self.answer({"error": message}, status, X_Error_Message=message)
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, asked["visibility"])
            return self.answer({"url": f"{hub.address}/{name}"}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                "lfs" if file.endswith((".safetensors", ".png")) else "regular" for file in files
            ]
            return self.answer(
                {
                    "files": [
                        {"path": file, "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                {
                    "objects": [
                        {
                            **each,
                            "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}},
                        }
                        for each in json.loads(body)["objects"]
                    ]
                }
            )
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {}
            for line in lines[1:]:
                value = line["value"]
                is_large = line["key"] == "lfsFile"
                files[value["path"]] = (
                    hub.uploads[value["oid"]] if is_large else base64.b64decode(value["content"])
                )
            hub.commits.append((name, self.path.rpartition("/")[2], files))
            return self.answer(
                {"commitUrl": f"{hub.address}/{name}/commit/0", "commitOid": "0" * 40}
            )
        assert "/branch/" in self.path
        return self.answer({})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.uploads[oid] = content
        self.answer({})

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        name = "/".join(self.path.split("/")[3:5])
        known = self.server.repositories.get(name)
        self.answer({"id": name, "private": known == "private"}, 200 if known else 404)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in that the library takes for the Hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def ready(tmp_path_factory, tokenizer):
    root = make_stages(tmp_path_factory.mktemp("ready"), tokenizer)
    for stage in ("sft", "lora"):
        write_model_card(root / stage, Choices("mit"))
    return root


@pytest.fixture
def stages(tmp_path, tokenizer):
    """Stage directories with cards, which a test may change."""
    root = make_stages(tmp_path / "runs", tokenizer)
    write_model_card(root / "sft", Choices("mit"))
    return root


def test_what_arrives_is_what_is_there_and_loads(ready, hub, tmp_path, capsys):
    stage = ready / "sft"
    run_cli("push", stage, REPO)
    assert set(hub.files()) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    for name, content in hub.files().items():
        expected = (stage / name).read_bytes()
        assert content == (
            expected.replace(b"OWNER/NAME", REPO.encode()) if name == CARD else expected
        )
    assert f'from_pretrained("{REPO}", trust_remote_code=True)'.encode() in hub.files()[CARD]
    assert [(name, branch) for name, branch, _ in hub.commits] == [(REPO, "main")]
    assert hub.repositories == {REPO: "private"}
    said = capsys.readouterr()
    assert f"to {hub.address}/{REPO} (private)" in said.out
    assert TOKEN not in said.out + said.err

    # The token is for the Hub, and not for the storage of large files
    sent = {(command, header) for command, _, header in hub.requests if command != "GET"}
    assert sent == {("POST", f"Bearer {TOKEN}"), ("PUT", None)}

    for name, content in hub.files().items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(tmp_path)("the fox", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, load_model(stage)(ids).logits)


def test_a_dry_run_lists_what_goes_and_what_stays_without_network_and_token(
    stages, hub, monkeypatch, capsys
):
    stage = stages / "sft"
    kept = ("checkpoint-5/optimizer.pt", "wandb/run.wandb", ".env", "training_args.bin", "id_rsa")
    kept += ("old.pth", "notes.txt", "train_log.jsonl", "pytorch_model.bin")
    for name in kept:
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_text("secret")
    monkeypatch.delenv("HF_TOKEN")
    run_cli("push", stage, REPO, "--dry_run")
    listed, _, left_out = capsys.readouterr().out.partition("left out:\n")
    assert hub.requests == []
    size = (stage / "model.safetensors").stat().st_size
    assert f"  model.safetensors: {size:,} bytes\n" in listed
    assert f"{REPO} would get 10 files, " in listed
    reasons = dict(line.strip().split(": ") for line in left_out.splitlines())
    assert set(reasons) == {name.split("/")[0] for name in kept} | {"stage.json", "run.json"}
    assert reasons["checkpoint-5"] == "a checkpoint, to resume a run from"
    assert reasons["training_args.bin"] == reasons["old.pth"]
    assert reasons["pytorch_model.bin"] == "a pickle, which can run code when it is read"
    assert reasons["stage.json"].startswith("names directories of this machine")
    assert (reasons[".env"], reasons["id_rsa"]) == ("hidden", "no file of a model")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run_cli("push", stage, REPO)
    assert b"secret" not in b"".join(hub.files().values())
    assert len(hub.files()) == 10


def test_a_list_of_names_decides_and_not_a_list_of_exceptions(ready):
    for stage in ("sft", "lora"):
        plan = plan_upload(ready / stage, REPO, "me/base")
        assert not any(file.path.suffix in (".bin", ".jsonl") for file in plan.files)
        there = {path.name for path in (ready / stage).iterdir()}
        assert {file.path.name for file in plan.files} | set(plan.left_out) == there


@pytest.mark.parametrize(
    ("name", "secret", "kind"),
    [
        (CARD, "hf_" + "a" * 34, "a token of the Hub"),
        ("modeling_minimind.py", "sk-proj-" + "b" * 24, "a key of OpenAI"),
        ("tokenizer_config.json", 'WANDB_API_KEY": "' + "0f" * 20, "a key of wandb"),
        ("chat_template.jinja", "ghp_" + "c" * 36, "a token of GitHub"),
        ("config.json", "AKIA" + "D" * 16, "a key of AWS"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ],
)
def test_a_secret_is_named_by_its_place_and_not_shown(stages, hub, capsys, name, secret, kind):
    file = stages / "sft" / name
    before = file.read_text() if file.exists() else ""
    file.write_text(f"{before}\n# {secret}\n")
    message = failure(capsys, run_cli, "push", stages / "sft", REPO)
    line = len(before.splitlines()) + (1 if before.endswith("\n") or not before else 0) + 1
    assert f"{file}:{line}: found what looks like {kind}" in message
    assert secret not in message
    assert hub.requests == []


def test_an_adapter_goes_up_with_the_repository_of_its_base(ready, hub, capsys):
    message = failure(capsys, run_cli, "push", ready / "lora", REPO)
    assert "is an adapter, and its base is known only by its directory here" in message
    assert hub.requests == []
    run_cli("push", ready / "lora", REPO, "--base_model", "me/base")
    arrived = json.loads(hub.files()["adapter_config.json"])
    local = json.loads((ready / "lora" / "adapter_config.json").read_text())
    assert arrived == local | {"base_model_name_or_path": "me/base"}
    assert local["base_model_name_or_path"] == str(ready / "sft")
    card = hub.files()[CARD].decode()
    assert "\nbase_model: me/base\n" in card
    assert 'from_pretrained("me/base", trust_remote_code=True)' in card
    assert "OWNER/" not in card
    for content in hub.files().values():
        assert str(ready).encode() not in content


def test_a_branch_is_made_and_a_public_repository_said(ready, hub, capsys):
    run_cli("push", ready / "sft", REPO, "--public", "--revision", "v1/a")
    assert hub.repositories == {REPO: "public"}
    assert ("POST", f"/api/models/{REPO}/branch/v1%2Fa", f"Bearer {TOKEN}") in hub.requests
    assert hub.commits[0][1] == "v1%2Fa"
    assert f"{hub.address}/{REPO} (public)" in capsys.readouterr().out

    hub.repositories["me/old"] = "private"
    run_cli("push", ready / "sft", "me/old", "--public")
    said = capsys.readouterr().out
    assert "(private)" in said
    assert f"is private: see {hub.address}/me/old/settings" in said


def test_a_model_without_a_licence_is_pushed_with_a_notice(stages, hub, capsys):
    write_model_card(stages / "pretrain")
    run_cli("push", stages / "pretrain", REPO)
    assert "notice: the card states no licence" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["model.gguf", "index.html"])
def test_an_export_goes_up_without_its_record(tmp_path, file):
    for name in (file, "Modelfile", "LICENSE.wllama", "export.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\nOWNER/NAME\n")
    plan = plan_upload(tmp_path, REPO)
    assert {each.path.name for each in plan.files} == {file, "Modelfile", "LICENSE.wllama", CARD}
    assert list(plan.left_out) == ["export.json"]
    assert plan.license == "mit"


# What goes wrong


@pytest.mark.parametrize(
    ("end", "status", "expected"),
    [
        ("/create", 401, "does not accept the token (401). Log in again with `hf auth login`"),
        ("/create", 403, "the token may not write to me/small-model (403: no ***)"),
        ("/commit/main", 413, "refused to take me/small-model (413: no ***)"),
        ("/validate-yaml", 400, "refused to take me/small-model (400: no ***)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message_without_the_token(
    ready, hub, capsys, end, status, expected
):
    hub.refusals = {end: (status, f"no {TOKEN}")}
    message = failure(capsys, run_cli, "push", ready / "sft", REPO)
    assert expected in message
    assert TOKEN not in message
    assert hub.commits == []


def test_a_network_that_is_down_or_off_is_one_message(ready, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    message = failure(capsys, run_cli, "push", ready / "sft", REPO)
    assert f"{REPO} could not be pushed to http://127.0.0.1:" in message
    assert "Look at the network and at HF_ENDPOINT" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = failure(capsys, run_cli, "push", ready / "sft", REPO)
    assert message == "minimind push needs the network, and HF_HUB_OFFLINE is set."


def test_without_a_token_nothing_is_sent(ready, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    message = failure(capsys, run_cli, "push", ready / "sft", REPO)
    assert "found no token of the Hub. Log in with `hf auth login`, or set HF_TOKEN" in message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model", "it has no owner"),
        ("a/b/c", "Repo id must be in the form"),
        ("me/no good", "Repo id must use alphanumeric chars"),
        ("me/a--b", "Cannot have -- or .."),
    ],
)
def test_a_name_that_the_hub_would_refuse_is_refused_first(ready, hub, capsys, name, problem):
    message = failure(capsys, run_cli, "push", ready / "sft", name)
    assert f"REPO {name}: {problem}" in message
    assert "Expected OWNER/NAME" in message
    assert hub.requests == []


def test_what_is_not_a_complete_model_is_refused(stages, tmp_path, hub, capsys):
    message = failure(capsys, run_cli, "push", stages / "reward", REPO)
    assert "has no model card (README.md). Write it with minimind card" in message
    assert "is not a complete stage directory" in failure(capsys, run_cli, "push", tmp_path, REPO)
    (stages / "sft" / "model.safetensors").write_bytes(
        (stages / "pretrain" / "model.safetensors").read_bytes()
    )
    message = failure(capsys, run_cli, "push", stages / "sft", REPO)
    assert "the weights are not those of this stage" in message
    (tmp_path / "model.gguf").write_text("x")
    assert "it is no complete export" in failure(capsys, run_cli, "push", tmp_path, REPO)
    assert hub.requests == []


@pytest.mark.slow
def test_the_command_pushes_what_loads_where_the_package_is_not(ready, hub, tmp_path):
    """As a user starts it, and as a reader of the Hub loads it, with the code that was pushed."""
    package = Path(__file__).parent.parent
    env = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(package), "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [sys.executable, "-m", "minimind.cli", "push", str(ready / "sft"), REPO]
    run = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr

    (tmp_path / "repo").mkdir()
    for name, content in hub.files().items():
        (tmp_path / "repo" / name).write_bytes(content)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        "print(A.from_pretrained('repo', trust_remote_code=True).num_parameters());"
        "assert 'minimind' not in sys.modules"
    )
    env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert run.stdout.split()[-1] == str(load_model(ready / "sft").num_parameters()), run.stderr
