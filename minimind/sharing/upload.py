"""`minimind push`: a stage directory or an export as a repository of the Hub.

Only files on a list go up, in one commit: a directory may hold checkpoints, pickles, trackers' logs
and whatever else. The token comes from where the Hub's tools keep it, and is in no message.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from minimind.common.errors import UserError, first_line
from minimind.common.files import read_json
from minimind.sharing.model_card import BASE, CARD, EXPORT, REPOSITORY, load_card
from minimind.stage_directory import is_adapter, require_stage
from minimind.stage_directory.record import check_unchanged
from minimind.tokenizer.loading import COPY

# What a reader of a model needs, as patterns of names
FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors")
FILES += ("model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors")
FILES += ("configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py")
FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", CARD, "loss.png")
FILES += ("model.gguf", "Modelfile", "index.html", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*")
# Why the others stay here, by patterns of names; the first match counts
REASONS = {
    "checkpoint-*": "a checkpoint, to resume a run from",
    "training_args.bin": "a pickle, which can run code when it is read",
    "*.bin": "a pickle, which can run code when it is read",
    "*.p[tk]*": "a pickle, which can run code when it is read",
    "stage.json": "names directories of this machine; the model card has the rest",
    "run.json": "names directories of this machine; the model card has the rest",
    "export.json": "names directories of this machine; the model card has the rest",
    "report.html": "names directories of this machine; the model card has the rest",
    "*.jsonl": "a log of the run",
    "mask_report.json": "a log of the run",
    "score_card.json": "names directories of this machine; the model card has the rest",
}
OTHER = "no file of a model"
BINARY = (".safetensors", ".gguf", ".png")  # these are not searched for secrets
SECRETS = {
    "a token of the Hub": r"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a key of OpenAI or alike": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a key of wandb": r"(?i)(wandb_v\d_\w{20,}|(wandb|api_?key)\W{1,20}[0-9a-f]{40}\b)",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


class UploadFile(NamedTuple):
    """A file that goes up: as it is in the directory, or with the content that is given."""

    path: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content)


class UploadPlan(NamedTuple):
    """What a push would do: `left_out` has the names of all other files with the reason."""

    repository: str
    files: list[UploadFile]
    left_out: dict[str, str]
    license: str | None

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)


def plan_upload(
    directory: str | Path, repository: str, base_model: str | None = None
) -> UploadPlan:
    """What of a stage directory or an export goes up to a repository; needs no network.

    The names of the repository and of an adapter's base (`base_model`, by default what the card
    says) are put into the card and into adapter_config.json, where the base's directory is.

    Raises:
        UserError: a name is none of the Hub, there is no complete model or no model card, an
            adapter's base has no name, or a file holds a secret.
    """
    path = Path(directory)
    for option, name in (("REPO", repository), ("--base_model", base_model)):
        if name is not None:
            check_name(option, name)
    check_complete(path)
    if not (path / CARD).is_file():
        raise UserError(f"{path} has no model card ({CARD}). Write it with minimind card {path}.")

    names = sorted(each.name for each in path.iterdir())
    chosen = [name for name in names if _is_listed(name) and (path / name).is_file()]
    files = {name: UploadFile(path / name) for name in chosen}
    card = load_card(path / CARD)
    base_model = base_model or card.data.get("base_model")
    if is_adapter(path):
        if not base_model:
            raise UserError(
                f"{path} is an adapter, and its base is known only by its directory here. Push the"
                " base first and give its repository with --base_model OWNER/NAME, or merge the"
                f" two with minimind merge {path} OUT."
            )
        config = read_json(path / "adapter_config.json", COPY)
        config["base_model_name_or_path"] = base_model
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        files["adapter_config.json"] = UploadFile(path / "adapter_config.json", text.encode())
        card.data.base_model = base_model
    text = str(card) if is_adapter(path) else (path / CARD).read_text(encoding="utf-8")
    text = text.replace(REPOSITORY, repository).replace(BASE, base_model or BASE)
    files[CARD] = UploadFile(path / CARD, text.encode())

    refuse_secrets(files.values())
    left_out = {name: _reason(path / name) for name in names if name not in files}
    return UploadPlan(repository, [*files.values()], left_out, card.data.get("license"))


def check_name(option: str, name: str) -> None:
    """Raise UserError unless a word is OWNER/NAME as the Hub allows it."""
    try:
        validate_repo_id(name)
        problem = "" if "/" in name else "it has no owner"
    except HFValidationError as error:
        problem = first_line(error).rstrip(".")
    if problem:
        raise UserError(
            f"{option} {name}: {problem}. Expected OWNER/NAME, the owner being your name on the Hub"
            " or that of your organisation."
        )


def check_complete(path: Path) -> None:
    """Raise UserError unless a directory holds a complete model: a stage directory or an export."""
    if not any((path / name).is_file() for name in ("model.gguf", "index.html")):
        check_unchanged(require_stage(path))
    elif not (path / EXPORT).is_file():
        raise UserError(
            f"{path} has no {EXPORT}: it is no complete export. Write one with minimind export."
        )


def _is_listed(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in FILES)


def _reason(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    reasons = (words for pattern, words in REASONS.items() if fnmatch(path.name, pattern))
    return next(reasons, OTHER)


def refuse_secrets(files: Iterator[UploadFile]) -> None:
    """Raise UserError for text that looks like a password of some service; it is not shown."""
    for path, content in files:
        if path.suffix in BINARY:
            continue
        text = (path.read_bytes() if content is None else content).decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            for kind, pattern in SECRETS.items():
                if re.search(pattern, line):
                    raise UserError(
                        f"{path}:{number}: found what looks like {kind}. Nothing was pushed. Remove"
                        " it, and make it invalid where it was issued if anybody may have seen it."
                    )


def push(plan: UploadPlan, private: bool = True, revision: str | None = None) -> tuple[str, bool]:
    """Upload files in one commit to a repository, which is made if it is not there.

    Args:
        private: whether a new repository is private; an old one stays what it is.
        revision: the branch, which is made if it is not there; by default the main one.

    Returns:
        the address of the repository, and whether it is private.

    Raises:
        UserError: there is no token, or the Hub does not answer or refuses.
    """
    token = get_token()
    if not token:
        raise UserError(
            "found no token of the Hub. Log in with `hf auth login`, or set HF_TOKEN to a token"
            " with the permission to write (https://huggingface.co/settings/tokens)."
        )
    api, name = HfApi(token=token), plan.repository
    with hub_errors(api.endpoint, name, token):
        url = api.create_repo(name, private=private, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.create_commit(
            name,
            [CommitOperationAdd(each.path.name, each.content or each.path) for each in plan.files],
            commit_message="Upload with minimind push",
            revision=revision,
        )
        return str(url), bool(api.model_info(name).private)


@contextmanager
def hub_errors(endpoint: str, repository: str, token: str) -> Iterator[None]:
    """Turn what the Hub and the network raise in a block into one UserError, without the token."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError("minimind push needs the network, and HF_HUB_OFFLINE is set.") from error
    except Exception as error:
        # The library wraps what happens in one of its threads
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        answer = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
        if answer is not None:
            problem = refusal(endpoint, repository, answer)
        else:
            words = f"{type(chain[-1]).__name__}: {first_line(chain[-1])}"
            problem = (
                f"{repository} could not be pushed to {endpoint} ({words}). Look at the network and"
                " at HF_ENDPOINT, and run the same command again."
            )
        raise UserError(problem.replace(token, "***")) from None


def refusal(endpoint: str, repository: str, error: HfHubHTTPError) -> str:
    """What a refusal of the Hub means, and what to do."""
    status = error.response.status_code
    words = first_line(Exception(error.server_message or error)).rstrip(".")
    if status == 401:
        return (
            f"{endpoint} does not accept the token (401). Log in again with `hf auth login`, or set"
            " HF_TOKEN to a token with the permission to write."
        )
    if status == 403:
        return (
            f"the token may not write to {repository} (403: {words}). Use one with the permission"
            " to write, and an owner that is you or an organisation of yours."
        )
    return f"{endpoint} refused to take {repository} ({status}: {words})."
