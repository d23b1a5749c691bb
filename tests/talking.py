"""A stage directory whose model has learned a few short conversations by heart, and ends them."""

import torch

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.tokenizer import save_tokenizer

CHATS = {
    "你好": "你好！我是小狐狸🦊。",
    "who runs home?": "The fox.\nIt is quick.",
    "say nothing": "",
}


def write_learned(directory, tokenizer, **fields):
    """Write the stage directory; `CHATS` is what it answers."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = MiniMindConfig(**size, **heads, **special, vocab_size=len(tokenizer), **fields)
    model = MiniMindForCausalLM(config)
    roles = ("user", "assistant")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)],
            tokenize=False,
        )
        for pair in CHATS.items()
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory
