"""Stage 1, pretraining: documents -> a base model.

    python pretrain.py                                      # the embedded corpus, a tiny model
    python pretrain.py --config configs/pretrain/26m.yaml --train_files corpus.jsonl
    deepspeed pretrain.py --deepspeed ds_config_zero2.json

Reads   documents (jsonl with "text", txt, parquet, csv ...), joined with EOS, packed into blocks.
Writes  a stage directory (--output_dir, default runs/pretrain) for finetune_sft.py.
"""

from minimind.common.errors import reports_user_errors
from minimind.doctor import examine_run
from minimind.evaluation import language_model_metrics
from minimind.stages import PRETRAIN, load_inputs
from minimind.training.command_line import parse
from minimind.training.run import Stage
from minimind.training.tracking import start_tracking
from minimind.training.trainers import BlockTrainer


@reports_user_errors
def main() -> None:
    data_args, model_args, training_args = parse(*PRETRAIN.arguments)
    model, tokenizer, parent, blocks = load_inputs(PRETRAIN, training_args, data_args, model_args)

    stage = Stage(PRETRAIN, training_args, blocks, model, tokenizer, parent, options=[model_args])
    stage.begin()
    start_tracking(stage)
    trainer = BlockTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks.train,
        eval_dataset=blocks.eval,
        data_collator=PRETRAIN.collate(tokenizer, training_args),
        processing_class=tokenizer,
        eval_counts=blocks.facts["eval"] if blocks.eval else None,
    )
    stage.attach(trainer)
    examine_run(stage, trainer)
    stage.announce(trainer)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    stage.finish(
        trainer, tokenizer, lambda trainer: language_model_metrics(trainer, blocks.facts["eval"])
    )


if __name__ == "__main__":
    main()
