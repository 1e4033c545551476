# 15.7M parameters with prepare.py's default vocabulary of 4,096: 8 layers, 384 wide.
# Costs: 33 million tokens are 3.4e15 FLOPs: about 10 hours on two CPU cores (at 100 GFLOP/s).
# The optimizer was chosen in short runs: after 100 steps of 1,024 tokens Muon stood at 5.245 nats a
# token on held out text, AdamW at 5.634 (lr 1e-3) and 5.704 (2e-3). Its 1.5 s add 4% to a step.
out_dir = "out/small"

n_layers = 8
n_embd = 384
n_heads = 6
max_seq_len = 256

max_steps = 1000
batch_size = 16
tokens_per_step = 8 * batch_size * max_seq_len  # 8 micro-steps on one device
optimizer = "muon"
momentum = 0.9
lr = 4e-3
warmup_steps = 100

eval_interval = 200
checkpoint_interval = 200
sample_interval = 200
