"""A chat page in one file: a model as GGUF, and llama.cpp for the browser, which runs it there.

llama.cpp for the browser is wllama's WebAssembly, from its npm package: the last version whose
program has a build for one thread, which is small and needs no headers that only a server can
send. The page opens by a double click, and its policy forbids it every connection.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import constants

from minimind.common.cache import cache_directory
from minimind.common.errors import UserError
from minimind.common.files import write_bytes
from minimind.common.language import is_chinese, say
from minimind.export.prompts import Speaker

PAGE = Path(__file__).with_name("web.html").read_text(encoding="utf-8")
VERSION = "2.4.0"
# As npm publishes it
INTEGRITY = (
    "KuVHeTUXcqHF01d85q3nWaRSVLpszULNGjO+nx4cyZ8sBjZvKSMViWNCfcs/1w2bqjyegERJzWsrdQSHSEoSlQ=="
)
CODE, WASM, LICENCE = "esm/index.js", "esm/single-thread/wllama.wasm", "LICENCE"
REGISTRY = "https://registry.npmjs.org"
LARGEST = 2**30  # bytes of a model
BLOCK = 3 * 2**20  # bytes of a file in one element of the page


def wllama() -> dict[str, bytes]:
    """The files of wllama's npm package that a page needs, downloaded once into the cache.

    Raises:
        UserError: the package cannot be downloaded, or is not the one that npm publishes.
    """
    file = cache_directory("wllama") / f"wllama-{VERSION}.tgz"
    with suppress(OSError):
        return unpack(file.read_bytes())
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    address = f"{registry.rstrip('/')}/@wllama/wllama/-/{file.name}"
    remedy = (
        f"Run `npm pack @wllama/wllama@{VERSION}` on a computer that has npm, and put the file at"
        f" {file}; or set NPM_CONFIG_REGISTRY to another npm registry."
    )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--format web needs wllama, and HF_HUB_OFFLINE is set. {remedy}")
    say(f"downloading {address} (5 MB, once)")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read()
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{address}: cannot be downloaded ({error}). {remedy}") from error
    files = unpack(content)
    write_bytes(file, content)
    return files


def unpack(archive: bytes) -> dict[str, bytes]:
    """The files of a package; raises UserError unless it is the one that npm publishes."""
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != INTEGRITY:
        raise UserError(
            f"wllama-{VERSION}.tgz is not the file that npm publishes: its SHA-512 differs. Remove"
            f" it from {cache_directory('wllama')}, and run the command again."
        )
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        return {
            name: members.extractfile(f"package/{name}").read() for name in (CODE, WASM, LICENCE)
        }


def write_page(
    out: Path, gguf: Path, dtype: str, speaker: Speaker, program: dict[str, bytes]
) -> None:
    """Write `index.html` and wllama's licence into a directory.

    Args:
        gguf: the model's file; its data type is `dtype`.
        program: wllama's files.

    Raises:
        UserError: the chat template cannot be written as pieces of text, or the model is too large.
    """
    if speaker.chats and speaker.pieces is None:
        raise UserError(
            "the chat template of this tokenizer is more than fixed text around the messages, and a"
            " page cannot render it. Use --format gguf with llama-server, or fine-tune with"
            " --chat_template chatml."
        )
    if (size := gguf.stat().st_size) > LARGEST:
        raise UserError(
            f"the model's file has {size / 2**20:,.0f} MiB, and a page has room for"
            f" {LARGEST / 2**20:,.0f}. Use --dtype q8_0, or --format gguf."
        )
    facts = {
        "language": "zh" if is_chinese() else "en",
        "millions": f"{speaker.parameters / 1e6:.1f}",
        "dtype": dtype,
        "window": speaker.window,
        "batch": 64,  # tokens that are read before the page looks at its stop button
        "max": min(256, speaker.window // 2),
        "temperature": 0.7,
        "top_p": 0.9,
        "pieces": speaker.pieces and asdict(speaker.pieces),
        "start": speaker.start,
        "controls": list(speaker.special.values()),
        "special": list(speaker.special),
        "ends": speaker.ends,
    }
    licence = program[LICENCE].decode()
    files = {
        "wllama.js": program[CODE],
        "wllama.wasm": program[WASM],
        "model.gguf": gguf.read_bytes(),
    }
    page = PAGE.replace("$POLICY", policy()).replace("$LICENCE", licence)
    page = page.replace("$FACTS", json.dumps(facts).replace("<", r"\u003c"))
    before, after = page.split("$PARTS")
    with (out / "index.html").open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        file.writelines(blocks(files))
        file.write(after)
    write_bytes(out / "LICENSE.wllama", program[LICENCE])


def blocks(files: dict[str, bytes]) -> Iterator[str]:
    """Elements that hold files: base64 of gzip, whose checksum the browser verifies."""
    for name, content in files.items():
        packed = gzip.compress(content, mtime=0)
        for start in range(0, len(packed), BLOCK):
            text = base64.b64encode(packed[start : start + BLOCK]).decode()
            yield f'<script type="text/plain" data-file="{name}">{text}</script>\n'


def policy() -> str:
    """The page's security policy: its own script and style, what it unpacks, and no connection."""

    def digest(tag: str) -> str:
        content = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1].encode()
        return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')} blob:"
        " 'wasm-unsafe-eval'; worker-src blob:; connect-src data:; base-uri 'none';"
        " form-action 'none'"
    )
