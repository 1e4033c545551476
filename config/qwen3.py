# For studying Qwen3: tiny.py with normalised queries and keys, two query heads to a key/value head,
# and heads wider than n_embd / n_heads. Checkpoints are Qwen3ForCausalLM directories. Time and text
# are about those of tiny.py.
from config.tiny import *

out_dir = "out/qwen3"

qk_norm = True
n_kv_heads = 2
head_dim = 64
norm_eps = 1e-6
rope_theta = 1e6
