"""Small stage directories as runs leave them, for the tests of the model card and the upload."""

import copy
import json
import warnings

import torch
from peft import LoraConfig, get_peft_model

from minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForSequenceClassification
from minimind.data.template_choice import set_chat_template
from minimind.stage_directory import provenance, weights_hash
from minimind.tokenizer import tokenizer_hash

# As records have it: the home of somebody, and words that are no Markdown
FILES = {
    "pretrain": ["/home/alice/corpora/web|text.jsonl", "hf://datasets/owner/name@v1:zh:train"],
    "sft": ["/home/alice/chats/<b>`talk`\n\x1b[2J.jsonl"],
    "lora": ["relative/alice/more.jsonl"],
    "reward": ["C:\\Users\\alice\\pairs.jsonl"],
}
METRICS = {
    "pretrain": {"loss": 2.0, "bits_per_byte": 1.0, "perplexity": 7.389},
    "reward": {"loss": 0.4, "accuracy": 0.75, "accuracy_low": 0.53, "accuracy_high": 0.88},
}


def make_stages(root, tokenizer):
    """Write pretrain, sft and on it an adapter (lora) and a reward model; returns `root`."""
    tokenizer = copy.deepcopy(tokenizer)
    set_chat_template(tokenizer, "chatml")
    config = MiniMindConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    parent = None
    for number, stage in enumerate(("pretrain", "sft", "lora", "reward")):
        torch.manual_seed(number)
        directory = root / stage
        if stage == "lora":
            base = MiniMindForCausalLM.from_pretrained(root / "sft")
            lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                model = get_peft_model(base, lora)
            model.peft_config["default"].base_model_name_or_path = str(root / "sft")
        elif stage == "reward":
            config.num_labels = 1
            model = MiniMindForSequenceClassification(config)
        else:
            model = MiniMindForCausalLM(config)
        model.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        tokenizer.save_pretrained(directory)
        record = make_record(stage, parent and provenance(parent), number)
        record |= {"weights": weights_hash(directory), "tokenizer": tokenizer_hash(tokenizer)}
        (directory / "stage.json").write_text(json.dumps(record))
        recipe = {"optim": "muon", "max_steps": -1, "num_train_epochs": 2.0, "block_size": 128}
        run = {"run": "x", "recipe": recipe | {"use_peft": stage == "lora", "lora_r": 2}}
        (directory / "run.json").write_text(json.dumps(run))
        parent = parent if stage == "lora" else directory
    return root


def make_record(stage, parent, number):
    """What stage.json holds, of a run with so many hundreds of steps."""
    after = METRICS.get(stage, {"loss": 1.5})
    return {
        "stage": stage,
        "parent": parent,
        "data": {
            "train": {"files": FILES[stage], "hash": f"feed{number}", "rows": 1234, "truncated": 0},
            "eval": {"files": [], "hash": None, "rows": 20},
        },
        "options": {"learning_rate": 0.01 * (number + 1), "logging_dir": "/home/alice/logs"},
        "seed": 40 + number,
        "command": "pretrain.py --output_dir /home/alice/runs",
        "steps": 100 * number + 100,
        "tokens_seen": 50_000 + number,
        "seconds": 90.0,
        "hardware": {"device": "CPU, 2 threads", "processes": 3},
        "languages": {"zh": 0.8, "other": 0.19, "en": 0.01},
        "metrics": {"before": {"loss": 3.0}, "after": after},
        "token_loss": {"rows": 20, "held_out_rows": 20, "interval": [1.9, 2.2]},
    }
