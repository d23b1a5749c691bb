"""How a GGUF file is used: ollama's Modelfile beside it, and the commands for its model card."""

from pathlib import Path

from minimind.common.files import write_text
from minimind.export.prompts import PromptPieces, Speaker

MODELFILE = '''FROM ./model.gguf
TEMPLATE """{template}"""
{stops}
PARAMETER num_ctx {window}
PARAMETER temperature 0.7
PARAMETER top_p 0.9
PARAMETER repeat_penalty 1
'''
CHAT = """# In the terminal; a page and the interface of OpenAI / 终端对话；网页与 OpenAI 接口
llama-cli -m model.gguf
llama-server -m model.gguf --port 8080"""
TEXT = """# A base model, which continues texts / 基座模型，只会续写
llama-completion -m model.gguf -no-cnv -p "{start}The text begins"
llama-server -m model.gguf --port 8080"""
QUANTIZE = """# A smaller file / 更小的文件
llama-quantize model.gguf small.gguf Q4_K_M"""
OLLAMA = """# ollama
ollama create mine -f Modelfile && ollama run mine"""


def write_modelfile(out: Path, speaker: Speaker, dtype: str) -> str:
    """Write `Modelfile`, unless the chat template is more than pieces of text; returns the commands
    for the directory."""
    start = speaker.start
    template = ollama_template(speaker.pieces) if speaker.chats else f"{start}{{{{ .Prompt }}}}"
    commands = [CHAT if speaker.chats else TEXT.format(start=start)]
    if dtype in ("float32", "float16"):
        commands.append(QUANTIZE)
    if template:
        commands.append(OLLAMA)
        ends = [speaker.special[end] for end in speaker.ends if end in speaker.special]
        stops = "\n".join(f'PARAMETER stop "{end}"' for end in ends)
        text = MODELFILE.format(template=template, stops=stops, window=speaker.window)
        write_text(out / "Modelfile", text)
    return "\n".join(commands)


def ollama_template(pieces: PromptPieces | None) -> str | None:
    """Pieces of a chat template in the language of ollama, which is that of Go's text/template;
    None if it cannot hold them."""
    if pieces is None:
        return None
    texts = (*(pieces.system or ()), pieces.opening, pieces.reply, pieces.question, pieces.ending)
    if any(mark in text for text in texts for mark in ("{{", '"""')):
        return None
    opening, after = pieces.opening, pieces.reply
    if pieces.system:
        first, second = pieces.system
        opening = f"{{{{ if .System }}}}{first}{{{{ .System }}}}{second}{{{{ else }}}}{opening}"
        opening += "{{ end }}"
    if pieces.reply != pieces.ending:
        after = f"{{{{ if $last }}}}{pieces.ending}{{{{ else }}}}{pieces.reply}{{{{ end }}}}"
    return (
        f"{opening}{{{{ range $i, $message := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{after}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}'
        f"{{{{ if not $last }}}}{pieces.question}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )
