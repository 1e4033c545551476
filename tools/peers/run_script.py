"""Run a script as `python SCRIPT ...` would, then print the most GPU memory that it held.

python run_script.py SCRIPT ...
"""

import os
import runpy
import sys

sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    print("peak", torch.cuda.max_memory_allocated())
