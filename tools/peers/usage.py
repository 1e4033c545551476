"""Run a command for at most SECONDS; print the CPU seconds and the peak bytes of memory it took.

python usage.py SECONDS COMMAND ...    (0: for any time)

It stands between bench.py and what is measured, because the peak that Linux reports for a process
begins with the memory of its parent.
"""

import os
import subprocess
import sys
import threading

process = subprocess.Popen(sys.argv[2:], env={**os.environ, "PYTHONUNBUFFERED": "1"})
timer = threading.Timer(float(sys.argv[1]) or threading.TIMEOUT_MAX, process.kill)
timer.start()
_, status, usage = os.wait4(process.pid, 0)
timer.cancel()
if status:
    sys.exit(f"exit code {os.waitstatus_to_exitcode(status)}")
unit = 1 if sys.platform == "darwin" else 1024
print("usage", usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)
