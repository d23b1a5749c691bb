"""Replies to judge, of a stage directory whose model writes short random ones or given as they are,
and rules that judge them."""

import json

import torch

from minimind import MiniMindForCausalLM, MiniMindForSequenceClassification
from minimind.tokenizer import save_tokenizer

PROMPTS = [f"who runs home? {number}" for number in range(6)]
RULES = """
def long(messages, reply):
    return len(reply)

def asks(messages, reply):
    messages.clear()
    return "?" in reply

def first(messages, first, second):
    return True

def shorter(messages, first, second):
    return len(second) - len(first)

def text(messages, reply):
    return "good"

def broken(messages, reply):
    return 1 / 0

number = 3
"""


class Scripted:
    """A subject that gives these replies in turn, and keeps what it was asked."""

    max_length = 512

    def __init__(self, tokenizer, replies):
        self.tokenizer, self.given = tokenizer, replies
        self.asked, self.samplings = [], []

    def replies(self, prompts, sampling):
        self.asked += [self.tokenizer.decode(each) for each in prompts]
        self.samplings.append(sampling)
        return self.given[: len(prompts)]


def write_talker(directory, config, tokenizer, seed=0, ends=10):
    """Write a stage directory; its model writes printable ASCII alone, and so many of the tokens
    end a reply."""
    torch.manual_seed(seed)
    MiniMindForCausalLM(config).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    texts = {token: tokenizer.decode([token]) for token in range(3, len(tokenizer))}
    spoken = [token for token, text in texts.items() if text.isascii() and text.isprintable()]
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token_id"] = [2, *spoken[:ends]]
    settings["suppress_tokens"] = sorted({*range(len(tokenizer))} - {2, *spoken})
    path.write_text(json.dumps(settings))
    return str(directory)


def write_scorer(directory, config, tokenizer):
    """Write a stage directory with a reward model of random weights."""
    torch.manual_seed(2)
    config.num_labels = 1
    MiniMindForSequenceClassification(config).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return str(directory)
