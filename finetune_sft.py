"""Stage 2, supervised fine-tuning: conversations -> a chat model. The loss is on the assistant's
turns alone.

    python finetune_sft.py                                     # the embedded corpus, runs/pretrain
    python finetune_sft.py --config configs/sft/26m.yaml --train_files chats.jsonl
    python finetune_sft.py --use_peft --output_dir runs/lora   # LoRA: one more skill, on runs/sft
    deepspeed finetune_sft.py --deepspeed ds_config_zero2.json

Reads   conversations (minimind, OpenAI messages, ShareGPT, alpaca; with tools and reasoning) and a
        stage directory (--model_name_or_path).
Writes  a stage directory (--output_dir, default runs/sft) for train_dpo.py; with --use_peft an
        adapter.
"""

from minimind.common.errors import decoration, reports_user_errors
from minimind.common.launch import is_main_process
from minimind.doctor import examine_run
from minimind.evaluation import held_out_metrics
from minimind.inspection.display import print_inspection
from minimind.stages import LORA, SFT, inspect_training_rows, load_inputs
from minimind.training.command_line import parse
from minimind.training.run import Stage
from minimind.training.starting_point import adapter_config
from minimind.training.tracking import start_tracking
from minimind.training.trainers import ChatSFTTrainer


@reports_user_errors
def main() -> None:
    data_args, chat_args, model_args, training_args = parse(*SFT.arguments)
    spec = LORA if model_args.use_peft else SFT
    model, tokenizer, parent, rows = load_inputs(
        spec, training_args, data_args, model_args, chat_args
    )

    inspection = inspect_training_rows(spec, rows, tokenizer, data_args, chat_args)
    if is_main_process():
        with decoration("showing the inspection"):
            print_inspection(inspection, range(1), tokenizer)
    inspection.stop(training_args.on_findings)

    stage = Stage(
        spec, training_args, rows, model, tokenizer, parent, options=[model_args, chat_args]
    )
    stage.begin()
    start_tracking(stage, inspection.report)
    trainer = ChatSFTTrainer(
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
    stage.finish(trainer, tokenizer, held_out_metrics, inspection.report)


if __name__ == "__main__":
    main()
