"""`minimind export`."""

from argparse import Namespace

from minimind.common.files import check_output
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "export", help="write a model as vLLM, llama.cpp, ollama and transformers read it"
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", help="a stage directory; adapters are merged")
    add("out", help="directory to write; must be new or empty")
    add(
        "--format",
        required=True,
        choices=("qwen3", "qwen3-moe", "llama", "minimind", "gguf", "web"),
        help=(
            "qwen3 (qk_norm), qwen3-moe or llama (no qk_norm) for stock tools, minimind with its"
            " own code, gguf for llama.cpp and ollama, web for a page that runs the model itself"
        ),
    )
    dtypes = ("float32", "float16", "bfloat16", "q8_0")
    dtype = "default: that of the saved weights, for web q8_0; q8_0 is for gguf and web"
    add("--dtype", choices=dtypes, help=dtype)


def run(args: Namespace) -> None:
    """Export the model and verify what was written."""
    from minimind.common.launch import prepare_launch
    from minimind.export import export
    from minimind.export.verification import report

    prepare_launch(uses_deepspeed=False)
    check_output(args.out, directory=True)
    record = export(args.directory, args.out, args.format, args.dtype)
    say(f"{args.directory} -> {args.out} ({record['format']}, {record['dtype']})")
    say(report(record["verification"]))
    if args.format == "web":
        say(f"Open {args.out}/index.html: a double click is enough.")
