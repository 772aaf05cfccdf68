"""Fine-tuning from the command line: SFT and QLoRA on transformers, TRL and PEFT."""
