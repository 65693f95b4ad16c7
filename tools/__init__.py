import os

# Read when torch is imported: without it the profiler that benchmark counts memory with writes its own log to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
