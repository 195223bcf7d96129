"""Names of other trainers' settings, and the field of a recipe that does the same job."""

_ADVICE = {
    **dict.fromkeys(
        ("learning_rate", "lr", "muon_lr"),
        "matrix_lr for the matrices, head_lr for the head (see `poe recipes tool` for their usual size)",
    ),
    **dict.fromkeys(
        ("batch_size", "per_device_train_batch_size", "train_batch_size", "micro_batch_size", "global_batch_size"),
        "tokens_per_step for the tokens of a step, max_tokens_per_batch for those that are in memory at once",
    ),
    "gradient_accumulation_steps": "tokens_per_step: a step passes through as many batches as it needs",
    **dict.fromkeys(
        ("num_train_epochs", "num_epochs", "n_epochs"), "epochs, or *N after a source: --data rows.jsonl*3"
    ),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "block_size", "context_length"), "seq_len"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "rank, for layers: fork"),
    "lora_alpha": "rank: alpha equals it, so the rate alone sets the size of a change",
    "lora_dropout": "weight_decay: there is no dropout",
    "target_modules": "attach_at and rank, for layers: fork: every linear layer from attach_at up is changed",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "checkpoint_activations"),
    **dict.fromkeys(("bf16", "fp16", "precision"), "dtype: auto, bfloat16 or float32"),
    "warmup_steps": "warmup_ratio, a share of the steps",
    **dict.fromkeys(("lr_scheduler_type", "scheduler"), "warmup_ratio and warmdown_ratio: up, level, down in a line"),
    **dict.fromkeys(("save_steps", "save_strategy"), "checkpoint_every, in seconds"),
    "save_total_limit": "keep_checkpoints",
    **dict.fromkeys(("eval_steps", "eval_strategy", "evaluation_strategy"), "validation_every, in steps"),
    **dict.fromkeys(("val_set_size", "test_size", "eval_split"), "validation_ratio"),
    "report_to": "track: tensorboard, wandb or trackio",
    **dict.fromkeys(("output_dir", "output"), "--out on the command line, output_dir= in train_stage"),
    **dict.fromkeys(("model", "model_name_or_path", "model_name"), "--base on the command line, the cascade in Python"),
    **dict.fromkeys(("dataset", "dataset_name", "train_file", "train_dataset"), "--data, data= in train_stage"),
    **dict.fromkeys(("eval_dataset", "validation_file"), "eval_data"),
    **dict.fromkeys(("optim", "optimizer"), "matrix_optimizer: muon or adamw"),
    **dict.fromkeys(("packing", "assistant_only_loss", "completion_only_loss"), "nothing: that is always on"),
}


def advise(name: str) -> str:
    """Return ` Here it is ...` for a setting of another trainer, spelled with `_` or `-`; else nothing."""
    advice = _ADVICE.get(name.strip("-").replace("-", "_"))
    return f" Here it is {advice}." if advice else ""
