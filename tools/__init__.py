import os

# Read when torch is imported: without them the profiler that benchmark counts memory with writes its own log, and
# warnings of no use to the reader, to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
