"""Stage 1, pretraining: documents -> a base model.

    python pretrain.py                                      # the embedded corpus, a tiny model
    python pretrain.py --config configs/pretrain/26m.yaml --train_files corpus.jsonl
    deepspeed pretrain.py --deepspeed ds_config_zero2.json

Reads   documents (jsonl with "text", txt, parquet, csv ...), joined with EOS and packed into blocks.
Writes  a stage directory (--output_dir, default runs/pretrain) for finetune_sft.py.
"""

from transformers import set_seed

from minimind.common.errors import reports_user_errors
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator
from minimind.doctor import examine_run
from minimind.evaluation import language_model_metrics
from minimind.stage_directory import check_same_tokenizer
from minimind.tokenizer import load_tokenizer
from minimind.training.arguments import DataArguments, PretrainConfig, PretrainModelArguments, parse
from minimind.training.optimizers import build_optimizer
from minimind.training.run import Stage
from minimind.training.starting_point import check_length, new_model, starting_point
from minimind.training.tracking import start_tracking
from minimind.training.trainers import BlockTrainer


@reports_user_errors
def main() -> None:
    data_args, model_args, training_args = parse(
        DataArguments, PretrainModelArguments, PretrainConfig
    )
    set_seed(training_args.seed)

    if model_args.model_name_or_path:
        model, tokenizer, parent = starting_point(
            model_args.model_name_or_path, model_args.attn_implementation
        )
        check_same_tokenizer(model_args.tokenizer, tokenizer)
    else:
        tokenizer, parent = load_tokenizer(model_args.tokenizer), None
        model = new_model(model_args.model_config, tokenizer, model_args.attn_implementation)
    check_length("block_size", training_args.block_size, model.config)
    blocks = load_blocks(data_args.or_embedded("pretrain"), tokenizer, **training_args.packing)

    stage = Stage("pretrain", training_args, blocks, model, tokenizer, parent, options=[model_args])
    stage.begin()
    start_tracking(stage)
    trainer = BlockTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks.train,
        eval_dataset=blocks.eval,
        data_collator=BlockCollator(
            tokenizer.pad_token_id, tokenizer.eos_token_id, training_args.document_mask
        ),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, training_args), None),
        eval_counts=blocks.facts["eval"] if blocks.eval else None,
    )
    stage.attach(trainer)
    examine_run(stage.name, trainer, stage.facts, parent)
    stage.announce(trainer)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    stage.finish(
        trainer, tokenizer, lambda trainer: language_model_metrics(trainer, blocks.facts["eval"])
    )


if __name__ == "__main__":
    main()
