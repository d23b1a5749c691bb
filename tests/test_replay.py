"""`minimind replay` names the rows, the tokens and the layer that make a loss not finite."""

import json

import pytest
import torch
from pipeline import document_rows, failure, run_cli, run_script, short_run, write_model

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.files import write_json
from minimind.training.kept_batches import save_batch
from minimind.training.replay import replay

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture
def keep(config, tokenizer, tmp_path):
    """Keep a batch of token ids as a run would, with a model that is changed before."""

    def write(ids, change=lambda model: None, weights=True, **extra):
        class Accelerator:
            def wait_for_everyone(self):
                pass

        class Trainer:
            accelerator, processing_class = Accelerator(), tokenizer

            class args:  # noqa: N801
                process_index, world_size, bf16, fp16 = 0, 1, False, False

        torch.manual_seed(0)
        model = MiniMindForCausalLM(
            MiniMindConfig(**config.to_dict() | {"tie_word_embeddings": False})
        )
        change(model)
        directory = tmp_path / "bad_batch-7"
        batch = {"input_ids": ids, "labels": ids.clone()} | extra
        save_batch(Trainer, directory, 7, [batch], float("nan"), 1.0, with_weights=False)
        if weights:
            model.config.eos_token_id, model.config.pad_token_id = (
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
            )
            model.save_pretrained(directory / "model")
            tokenizer.save_pretrained(directory / "model")
            record = json.loads((directory / "batch.json").read_text())
            write_json(directory / "batch.json", record | {"weights": "model"})
        return directory

    return write


def rows(config):
    return torch.randint(10, config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))


def test_a_token_with_a_bad_embedding_is_traced_to_its_row_and_position(keep, config):
    ids = rows(config)
    ids[2, 5] = 9

    def spoil(model):
        with torch.no_grad():
            model.model.embed_tokens.weight[9] = float("nan")

    report = replay(keep(ids, spoil))
    assert [bad["row"] for bad in report["bad_rows"]] == [2]
    assert report["first_layer"]["layer"] == "model.embed_tokens"
    assert report["first_layer"]["places"] == [[2, 5]]
    assert report["bad_weights"] == ["model.embed_tokens.weight"]
    assert report["loss"] is None
    assert report["step"] == 7


def test_a_layer_that_overflows_is_named(keep, config):
    def spoil(model):
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight.fill_(1e30)
            model.model.layers[1].mlp.up_proj.weight.fill_(1e30)

    report = replay(keep(rows(config), spoil))
    assert report["first_layer"]["layer"] == "model.layers.1.mlp.down_proj"
    assert report["bad_weights"] == []
    assert len(report["bad_rows"]) == 4


def test_a_gradient_that_overflows_behind_a_finite_loss_is_found(keep, config):
    def spoil(model):
        mlp = model.model.layers[1].mlp
        with (
            torch.no_grad()
            # Forward all cancels; the gradient of the smallest weights is the product of the
            # largest
        ):
            mlp.gate_proj.weight.mul_(1e9)
            mlp.up_proj.weight.mul_(1e-42)
            mlp.down_proj.weight.mul_(1e38)

    report = replay(keep(rows(config), spoil))
    assert report["loss"] is not None
    assert report["bad_rows"] == report["bad_weights"] == []
    assert report["first_layer"] is None
    assert report["first_gradient"]["layer"].startswith("model.layers.1.mlp")
    assert "model.layers.1.mlp.up_proj.weight" in report["bad_gradients"]


def test_a_healthy_batch_has_the_loss_of_the_model(keep, config):
    ids = rows(config)
    models = []
    report = replay(keep(ids, models.append))
    expected = models[0](input_ids=ids, labels=ids).loss.item()
    assert report["loss"] == pytest.approx(expected, rel=1e-5)
    assert report["bad_rows"] == report["bad_gradients"] == report["bad_weights"] == []
    assert report["first_layer"] is report["first_gradient"] is None


def test_only_the_replies_of_a_pair_count(keep, config):
    ids = rows(config)
    mask = torch.zeros_like(ids)
    mask[:, 8:] = 1
    directory = keep(ids, completion_mask=mask, attention_mask=torch.ones_like(ids))
    # a batch of pairs has no labels
    from safetensors.torch import load_file, save_file

    file = directory / "rank-0.safetensors"
    save_file(
        {name: value for name, value in load_file(file).items() if not name.endswith("labels")},
        file,
    )
    from minimind.stage_directory import load_model

    labels = torch.where(mask.bool(), ids, -100)
    expected = load_model(directory / "model")(input_ids=ids, labels=labels).loss.item()
    assert replay(directory)["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_weights_they_have_to_be_named(keep, config, capsys):
    directory = keep(rows(config), weights=False)
    assert "--model DIR" in failure(capsys, run_cli, "replay", directory)


def test_a_directory_without_a_kept_batch_is_one_message(capsys, tmp_path):
    assert "is no kept batch" in failure(capsys, run_cli, "replay", tmp_path)


def test_a_run_that_stops_is_explained_by_its_own_advice(
    monkeypatch, tmp_path, write_jsonl, capsys, tokenizer_dir
):
    """Whole way: pretrain, spoil one weight on disk, go on, stop, replay what the message names."""
    from safetensors.torch import load_file, save_file

    data = ["--train_files", write_jsonl("docs.jsonl", document_rows())]
    first = [*short_run(tmp_path / "first", block_size=32), "--tokenizer", tokenizer_dir]
    run_script(
        monkeypatch,
        "pretrain",
        *first,
        *data,
        "--model_config",
        write_model(tmp_path / "model.json"),
    )
    weights = load_file(tmp_path / "first" / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(weights, tmp_path / "first" / "model.safetensors", {"format": "pt"})
    (tmp_path / "first" / "stage.json").unlink()  # it has the hash of the weights
    again = short_run(tmp_path / "second", block_size=32, max_steps=4, max_nonfinite_steps=3)
    message = failure(
        capsys,
        run_script,
        monkeypatch,
        "pretrain",
        *again,
        *data,
        "--model_name_or_path",
        tmp_path / "first",
    )
    assert "3 steps in a row" in message
    run_cli("replay", message.split("minimind replay ")[1].split()[0].rstrip("."))
    output = capsys.readouterr().out
    assert "comes out of model.layers.1.self_attn.o_proj" in output
    assert "weights that are not finite: model.layers.1.self_attn.o_proj.weight" in output
