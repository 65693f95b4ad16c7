import os
import signal
import sys

# As signals.end_on_interrupt, which cannot be imported yet, while Python looks for one of the commands (-m tools.X).
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Read when torch is imported: without them the profiler that benchmark counts memory with writes its own log, and
# warnings of no use to the reader, to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
