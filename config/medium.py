# GPT-2 small's size: 12 layers, 768 wide; 124M parameters with the gpt2 tokenizer, 88M with the
# default vocabulary of 4,096.
# Costs: 20,000 steps are 2.6 billion tokens, 20 for each parameter, and 2.2e18 FLOPs: at 40% of
# an H100's 989 TFLOP/s, 1.6 hours on one and 12 minutes on eight (computed, not measured).
# Needs: 16 bytes a parameter, 2.0 GB, on each GPU, and activations, which grow with batch_size.
out_dir = "out/medium"

n_layers = 12
n_embd = 768
n_heads = 12
max_seq_len = 1024

max_steps = 20_000
batch_size = 8
tokens_per_step = 2 * 8 * batch_size * max_seq_len  # 2 micro-steps on 8 GPUs, 16 on one
lr = 1e-3
warmup_steps = 400

eval_interval = 500
eval_tokens = 1_048_576
checkpoint_interval = 500
sample_interval = 1000
