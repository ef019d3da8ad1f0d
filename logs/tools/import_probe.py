"""Prints, as JSON, the list of what importing the train_gpt.py in folder argv[1] did; for check.py.

What other modules do while the script imports them counts only for network, threads and CUDA.
"""

import json
import os
import sys
import threading

script = os.path.join(sys.argv[1], "train_gpt.py")
seen = []
FILES = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.chdir"}
PROCESSES = {"os.system", "subprocess.Popen"}
NETWORK = {"socket.connect", "socket.getaddrinfo"}


def by_script():
    """Whether the script itself acts now, or a function that it called."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith((script, "<frozen importlib")):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == script


def audit(event, args):
    """Python calls this before such acts."""
    if event in NETWORK or event in FILES | PROCESSES and by_script():
        seen.append(f"does {event}({args[0]})")


def read(self, key, get=os._Environ.__getitem__):
    """In place of os.environ[key]."""
    if by_script():
        seen.append(f"reads the environment variable {key}")
    return get(self, key)


os._Environ.__getitem__ = read
threads = threading.active_count()
sys.addaudithook(audit)
sys.path[0] = sys.argv[1]
import train_gpt  # noqa: E402, F401

torch = sys.modules.get("torch")
if threading.active_count() > threads:
    seen.append("starts a thread")
if torch and torch.cuda.is_initialized():
    seen.append("initialises CUDA")
print("\n" + json.dumps(seen), end="")
