"""Run a command, then print the peak bytes of memory that it took.

python usage.py COMMAND ...

It stands between bench.py and what is measured, because the peak that Linux reports for a process
begins with the memory of its parent.
"""

import os
import subprocess
import sys

process = subprocess.Popen(sys.argv[1:], env={**os.environ, "PYTHONUNBUFFERED": "1"})
_, status, usage = os.wait4(process.pid, 0)
if status:
    sys.exit(f"exit code {os.waitstatus_to_exitcode(status)}")
unit = 1 if sys.platform == "darwin" else 1024
print("peak", usage.ru_maxrss * unit)
