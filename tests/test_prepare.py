import json

from pipeline import document_rows, failure, run_cli, run_script, short_run, write_model

from minimind.data import documents
from minimind.training.data_arguments import DataArguments


def test_pretraining_finds_the_prepared_blocks(tokenizer_dir, tmp_path, monkeypatch):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in document_rows()))
    options = ["--train_files", path, "--tokenizer", tokenizer_dir, "--block_size", "32"]
    options += ["--eval_ratio", "0.2", "--packing_strategy", "bfd_split", "--document_mask", "true"]
    run_cli("prepare", *options)

    def refuse(*args, **kwargs):
        raise AssertionError("prepared twice")

    monkeypatch.setattr(documents, "_prepare", refuse)
    model = ["--model_config", write_model(tmp_path / "model.json")]
    run_script(monkeypatch, "pretrain", *options, *model, *short_run(tmp_path / "run"))
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert stage["data"]["train"]["documents"] + stage["data"]["eval"]["documents"] == len(
        document_rows()
    )


def test_an_option_that_pretraining_does_not_know_is_refused(capsys):
    assert "--blok_size" in failure(capsys, run_cli, "prepare", "--blok_size", "32")
    assert "--foo" in failure(capsys, run_cli, "world", "x", "--foo")


def test_with_a_clean_recipe_the_blocks_are_those_of_the_cleaned_files(
    tmp_path, write_jsonl, tokenizer
):
    rows = [
        {"text": f"{number} foxes run home and the dogs sleep in the sun for a while"}
        for number in range(9)
    ] * 2
    path = write_jsonl("raw.jsonl", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n  - exact_dedup\n")
    run_cli("clean", path, str(tmp_path / "cleaned"), "--recipe", str(recipe))
    prepared = [
        documents.load_blocks(arguments, tokenizer, 16).facts["train"]
        for arguments in (
            DataArguments([path], eval_ratio=0.0, clean_recipe=str(recipe)),
            DataArguments([str(tmp_path / "cleaned")], eval_ratio=0.0),  # its report is no data
        )
    ]
    assert prepared[0]["hash"] == prepared[1]["hash"]
    assert prepared[0]["documents"] == 9
