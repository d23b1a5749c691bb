"""Stage 3, direct preference optimisation: preference pairs -> an aligned chat model (Rafailov et
al., 2023).

    python train_dpo.py                                     # the embedded corpus, from runs/sft
    python train_dpo.py --config configs/dpo/26m.yaml --train_files pairs.jsonl
    deepspeed train_dpo.py --deepspeed ds_config_zero2.json

Reads   preference pairs (prompt/chosen/rejected in the usual formats) and a stage directory
        (--model_name_or_path), which is also the frozen reference.
Writes  a stage directory (--output_dir, default runs/dpo); with --use_peft an adapter.
"""

from minimind.common.errors import decoration, reports_user_errors
from minimind.common.launch import is_main_process
from minimind.doctor import examine_run
from minimind.evaluation import held_out_metrics
from minimind.inspection.display import print_inspection
from minimind.stages import DPO, inspect_training_rows, load_inputs
from minimind.training.command_line import parse
from minimind.training.preference_trainer import PreferenceTrainer
from minimind.training.run import Stage
from minimind.training.starting_point import adapter_config, reference_model
from minimind.training.tracking import start_tracking


@reports_user_errors
def main() -> None:
    data_args, chat_args, model_args, training_args = parse(*DPO.arguments)
    model, tokenizer, parent, rows = load_inputs(
        DPO, training_args, data_args, model_args, chat_args
    )
    reference = reference_model(model, training_args, model_args)

    inspection = inspect_training_rows(DPO, rows, tokenizer, data_args, chat_args)
    if is_main_process():
        with decoration("showing the inspection"):
            print_inspection(inspection, range(2), tokenizer)
    inspection.stop(training_args.on_findings)

    stage = Stage(
        DPO, training_args, rows, model, tokenizer, parent, options=[model_args, chat_args]
    )
    stage.begin()
    start_tracking(stage, inspection.report)
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
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
