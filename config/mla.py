# tiny.py with multi-head latent attention: a token's cache is 48 numbers a layer instead of 256.
# Checkpoints are DeepseekV3ForCausalLM directories without experts.
from config.tiny import *

out_dir = "out/mla"

use_mla = True
kv_lora_rank = 32
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
