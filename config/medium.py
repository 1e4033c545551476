# For one GPU or a node of them: GPT-2 small's size, 124M parameters with the gpt2 tokenizer.
# Takes: 1.4 hours on one H200, 12 minutes on eight H100s. Both are computed, not measured.
# Text: reads 2.6 billion tokens, 12 GB, for example FineWeb-Edu (not run here):
#     pip install -e ".[fast,text]"
#     python prepare.py 'hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/00[0-3]_*.parquet' \
#         --tokenizer=gpt2 --out=data/web
# Memory: 2.0 GB on each GPU, and activations, which grow with batch_size.
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
