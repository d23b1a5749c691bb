"""Stage 2, supervised fine-tuning: conversations -> a chat model. Only the assistant's turns are
trained.

    python finetune_sft.py                                  # the embedded corpus, from runs/pretrain
    python finetune_sft.py --config configs/sft/26m.yaml --train_files chats.jsonl
    python finetune_sft.py --use_peft --output_dir runs/lora    # LoRA: one more skill, from runs/sft
    deepspeed finetune_sft.py --deepspeed ds_config_zero2.json

Reads   conversations (minimind, OpenAI messages, ShareGPT, alpaca; tools and reasoning too) and a stage directory
        (--model_name_or_path).
Writes  a stage directory (--output_dir, default runs/sft) for train_dpo.py; with --use_peft an adapter.
"""

from transformers import set_seed

from minimind.common.errors import decoration, reports_user_errors
from minimind.common.launch import is_main_process
from minimind.data.chat_encoder import set_chat_template
from minimind.data.chats import ChatArguments, load_conversations
from minimind.doctor import examine_run
from minimind.evaluation import held_out_metrics
from minimind.inspection import has_roles, inspect_chats
from minimind.inspection.display import print_inspection
from minimind.training.arguments import DataArguments, ModelArguments, SFTStageConfig, parse
from minimind.training.run import Stage
from minimind.training.starting_point import adapter_config, check_length, starting_point
from minimind.training.tracking import start_tracking
from minimind.training.trainers import ChatSFTTrainer


@reports_user_errors
def main() -> None:
    data_args, chat_args, model_args, training_args = parse(
        DataArguments, ChatArguments, ModelArguments, SFTStageConfig
    )
    set_seed(training_args.seed)

    default, corpus = ("runs/sft", "lora") if model_args.use_peft else ("runs/pretrain", "sft")
    model, tokenizer, parent = starting_point(
        model_args.model_name_or_path, model_args.attn_implementation, default
    )
    check_length("max_length", training_args.max_length, model.config)
    set_chat_template(tokenizer, chat_args.chat_template)
    rows = load_conversations(
        data_args.or_embedded(corpus),
        tokenizer,
        training_args.max_length,
        chat_args,
        roles=not has_roles(tokenizer),
        seed=training_args.seed,
    )
    inspection = inspect_chats(
        "sft", rows, tokenizer, data_args.on_bad_rows, chat_args.train_turns == "all"
    )
    if is_main_process():
        with decoration("showing the inspection"):
            print_inspection(inspection, range(1), tokenizer)
    inspection.stop(training_args.on_findings)

    stage = Stage(
        "sft", training_args, rows, model, tokenizer, parent, options=[model_args, chat_args]
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
    examine_run(stage.name, trainer, stage.facts, parent)
    stage.announce(trainer)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    stage.finish(trainer, tokenizer, held_out_metrics, inspection.report)


if __name__ == "__main__":
    main()
