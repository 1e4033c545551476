"""Run a command, for so many seconds at most (0: any), then print the peak bytes of its memory.

python usage.py SECONDS COMMAND ...

It stands between bench.py and what is measured, because the peak that Linux reports for a process
begins with the memory of its parent.
"""

import os
import resource
import subprocess
import sys

limit, *command = sys.argv[1:]
os.environ["PYTHONUNBUFFERED"] = "1"
try:
    subprocess.run(command, timeout=float(limit) or None, check=True)
except subprocess.SubprocessError as error:  # it failed, or was killed at its limit
    sys.exit(str(error).rpartition("]' ")[2])
unit = 1 if sys.platform == "darwin" else 1024
print("peak", unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
