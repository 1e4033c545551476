# For GPT-2 itself: its small model as it was published, 124M parameters with its own tokenizer.
# Checkpoints are GPT2LMHeadModel directories. Time, text and memory are those of medium.py.
from config.medium import *

out_dir = "out/gpt2"

position = "learned"
norm = "layernorm"
mlp = "gelu"
bias = True

lr = 6e-4
warmup_steps = 700
