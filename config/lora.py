# For tuning a pretrained model in about half of the memory (LoRA), with its own tokenizer:
#     python prepare.py notes.jsonl --tokenizer=SmolLM2-135M/tokenizer.json --out=data/notes
#     python train.py config/lora.py --init_from=SmolLM2-135M --data_dir=data/notes
# Takes: 4.4 minutes on one CPU core (AMD EPYC, Zen 5) for SmolLM2-135M.
# Text: reads 30,720 tokens. To tune all weights, take a tenth of this lr and lora_rank=0.
# It is not compiled, because on a CPU compiling takes longer than so short a run.
out_dir = "out/lora"
compile = False

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
