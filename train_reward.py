"""A reward model: preference pairs -> a model that scores replies (Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155, eq. 1).

    python train_reward.py                                  # the embedded corpus, from runs/sft
    python train_reward.py --config configs/reward/26m.yaml --train_files pairs.jsonl
    deepspeed train_reward.py --deepspeed ds_config_zero2.json

Reads   preference pairs (prompt/chosen/rejected in the usual formats) and a stage directory
        (--model_name_or_path), whose head is replaced by a new one with a single output.
Writes  a stage directory (--output_dir, default runs/reward) for `minimind score` and for
        --reward_model; with --use_peft an adapter.
"""

from minimind.common.errors import decoration, reports_user_errors
from minimind.common.launch import is_main_process
from minimind.doctor import examine_run
from minimind.evaluation import reward_metrics
from minimind.inspection.display import print_inspection
from minimind.stages import REWARD, inspect_training_rows, load_inputs
from minimind.training.command_line import parse
from minimind.training.reward_trainer import RewardModelTrainer
from minimind.training.run import Stage
from minimind.training.starting_point import adapter_config
from minimind.training.tracking import start_tracking


@reports_user_errors
def main() -> None:
    data_args, chat_args, model_args, training_args = parse(*REWARD.arguments)
    model, tokenizer, parent, rows = load_inputs(
        REWARD, training_args, data_args, model_args, chat_args
    )

    inspection = inspect_training_rows(REWARD, rows, tokenizer, data_args, chat_args)
    if is_main_process():
        with decoration("showing the inspection"):
            print_inspection(inspection, range(2), tokenizer)
    inspection.stop(training_args.on_findings)

    stage = Stage(
        REWARD, training_args, rows, model, tokenizer, parent, options=[model_args, chat_args]
    )
    stage.begin()
    start_tracking(stage, inspection.report)
    trainer = RewardModelTrainer(
        model=model,
        args=training_args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, model),
    )
    stage.attach(trainer)
    examine_run(stage, trainer)
    stage.announce(trainer)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    stage.finish(trainer, tokenizer, reward_metrics, inspection.report)


if __name__ == "__main__":
    main()
