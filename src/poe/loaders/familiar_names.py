"""Words of transformers, PEFT and TRL that a cascade has another word for."""

NAMES = {
    "merge_and_unload": "cascade.export_native(name, folder) writes an ordinary checkpoint of the base's family",
    "merge_adapter": "a stage shares the base's weights and is never merged into them; see export_native",
    "unload": "the base is never changed: cascade.base is the model without stages",
    "get_base_model": "cascade.base is the base",
    "add_adapter": "cascade.add_stage(name='mine', num_layers=2), or layers='fork' for changes like those of a LoRA",
    "add_weighted_adapter": "cascade.compose({'tool': 0.7, 'math': 0.3})",
    "load_adapter": "cascade.load_stage(repo) for a stage, cascade.import_stage(folder, name) for an adapter of PEFT",
    "set_adapter": "cascade.activate(name)",
    "active_adapter": "cascade.active",
    "active_adapters": "cascade.active",
    "delete_adapter": "cascade.remove_stage(name)",
    "disable_adapter": "with cascade.activated(None): ..., or stage=None in generate, call and chat",
    "disable_adapters": "cascade.activate(None)",
    "enable_adapters": "cascade.activate(name)",
    "peft_config": "cascade.stages[name].config",
    "forward": "call cascade(input_ids), or cascade.model(name)",
    "train": "poe.train_stage(cascade, recipe, data=...); for your own loop, cascade.model(name).train()",
    "eval": "models are in evaluation mode when they are opened; else cascade.model(name).eval()",
    "to": "the device is chosen when a base is opened: Cascade.from_pretrained(repo, device_map='cuda', dtype=...)",
    "cuda": "the device is chosen when a base is opened: Cascade.from_pretrained(repo, device_map='cuda')",
    "half": "the dtype is chosen when a base is opened: Cascade.from_pretrained(repo, dtype='bfloat16')",
    "device": "cascade.base.device",
    "dtype": "cascade.base.dtype",
    "parameters": "cascade.model(name).parameters(), or cascade.stages[name].parameters() for the stage's own",
    "named_parameters": "cascade.model(name), or cascade.stages[name] for the stage's own",
    "state_dict": "cascade.stages[name].delta_state_dict()",
    "gradient_checkpointing_enable": "checkpoint_activations=True in a recipe",
    "apply_chat_template": "cascade.tokenizer.apply_chat_template(...), or cascade.chat(messages)",
}


def explain_name(name: str) -> str:
    """Return the message of the `AttributeError` for a name that a cascade does not have."""
    message = f"A Cascade has no attribute {name!r}"
    return f"{message}: {NAMES[name]}." if name in NAMES else message
