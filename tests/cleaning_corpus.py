"""Texts to clean, a corpus of which it is known what becomes of it, and procedures for both."""

import json
from pathlib import Path

import yaml

from minimind.cleaning import Procedure, load_procedure

ROOT = Path(__file__).parents[1]
CHINESE = (
    "春天来了，公园里的花都开了。小明和妈妈一起去散步，"
    "他们在湖边看见一只白色的鸭子带着五只小鸭子游过来。小明问妈妈，"
    "为什么小鸭子总是跟着它们的妈妈？妈妈说，因为小鸭子还小，要跟着妈妈学会找食物和躲避危险。"
    "回家以后，小明把看到的画了下来。"
)
ENGLISH = (
    "The river was high after the rain, and the old ferryman would not take his boat across until"
    " the water had gone down. So we waited in the little house on the bank, where his wife gave us"
    " bread and tea and told us how the bridge had been carried away in the great flood, long"
    " before any of us was born."
)
POEM = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
STATUTE = (
    "第一条　为了保护民事主体的合法权益，调整民事关系，维护社会和经济秩序，根据宪法，制定本法。\n"
    "第二条　民法调整平等主体的自然人、法人和非法人组织之间的人身关系和财产关系。\n"
    "第三条　民事主体的人身权利、财产权利以及其他合法权益受法律保护，任何组织或者个人不得侵犯。"
)


def procedure(*steps, **settings):
    return Procedure.from_dict({"steps": list(steps), **settings})


ALL = load_procedure(ROOT / "configs" / "data" / "pretrain.yaml")


def corpus(count=300):
    """Rows of which it is known what becomes of them; every tenth is the same as the row before."""
    kinds = [
        lambda n: f"第{n}号记录。{CHINESE}编号{n * 7919}，共{n * 104729}件。",
        lambda n: f"Entry {n * 7919} of the log. {ENGLISH} It was day {n * 104729}.",
        lambda n: f"<p>{STATUTE[n % 50 :]}</p>&nbsp;{n * 15485863}{'号文件、' * (n % 3)}",
        lambda n: f"No. {n}",
    ]
    rows = []
    for n in range(count):
        text = rows[-1]["text"].upper() if n % 10 == 9 else kinds[n % 4](n)
        rows.append(
            {
                "id": n,
                "text": text,
                "source": f"source {n % 3}",
                "meta": {"tags": [n], "none": None},
            }
        )
    return rows


def output(directory):
    paths = sorted(Path(directory).glob("data-*.jsonl"))
    return [
        json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()
    ]


def tree(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def small_shards(tmp_path):
    settings = yaml.safe_load((ROOT / "configs" / "data" / "pretrain.yaml").read_text()) | {
        "rows_per_shard": 40
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)
