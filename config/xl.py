# For one node of GPUs or several: 1.10 billion parameters with the gpt2 tokenizer.
# Takes: 101 hours on one H100, 14.5 hours on eight. Both are computed, not measured.
# Text: reads 21 billion tokens, 100 GB; prepare it with --tokenizer=gpt2.
# Memory: 18 GB on each GPU, and activations, which grow with batch_size.
out_dir = "out/xl"

n_layers = 22
n_embd = 2048
n_heads = 16
n_kv_heads = 4
multiple_of = 256
max_seq_len = 2048

max_steps = 41_000
batch_size = 8
tokens_per_step = 4 * 8 * batch_size * max_seq_len  # 4 micro-steps on 8 GPUs, 32 on one
lr = 4e-4
warmup_steps = 1000

eval_interval = 500
eval_tokens = 2_097_152
checkpoint_interval = 500
sample_interval = 1000
