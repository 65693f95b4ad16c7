"""The Slurm script, with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

from conftest import ROOT


def test_processes_get_the_cores_that_the_job_has(tmp_path: Path) -> None:
    """Since Slurm 22.05, srun has to be told; and it starts one torchrun a node, which all meet at the first."""
    for name, line in {"scontrol": "printf 'node3\\nnode4\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "64"}
    env = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", str(ROOT / "scripts/slurm.sh")], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    command = words.index(".venv/bin/torchrun")
    assert words[:command] == ["--cpus-per-task=64"]
    assert {"--nnodes=2", "--rdzv_id=77", "--rdzv_endpoint=node3:29400"} <= set(words[command:])
