# For those who tune a pretrained model in half of the memory (LoRA), with its own tokenizer:
# `python prepare.py notes.jsonl --tokenizer=SmolLM2-135M/tokenizer.json --out=data/notes`, then
# `python train.py config/lora.py --init_from=SmolLM2-135M --data_dir=data/notes`. docs/RUNS.md has
# a task, and what 60 of these steps did for it. All weights take a tenth of this rate.
out_dir = "out/lora"

lora_rank = 8
lora_alpha = 16

max_seq_len = 128
batch_size = 4
tokens_per_step = 512
max_steps = 60

lr = 1e-3
warmup_steps = 6
weight_decay = 0.0

log_interval = 5
eval_interval = 30
eval_tokens = 0
checkpoint_interval = 30
