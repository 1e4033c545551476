# For a node of GPUs: 360M parameters with the gpt2 tokenizer.
# Takes: 13 hours on one H100, 1.8 hours on eight. Both are computed, not measured.
# Text: reads 7.3 billion tokens, 34 GB; prepare it with --tokenizer=gpt2.
# Memory: 5.8 GB on each GPU, and activations, which grow with batch_size.
out_dir = "out/large"

n_layers = 24
n_embd = 1024
n_heads = 16
multiple_of = 256
max_seq_len = 2048

max_steps = 28_000
batch_size = 8
tokens_per_step = 2 * 8 * batch_size * max_seq_len  # 2 micro-steps on 8 GPUs, 16 on one
lr = 6e-4
warmup_steps = 500

eval_interval = 500
eval_tokens = 1_048_576
checkpoint_interval = 500
sample_interval = 1000
