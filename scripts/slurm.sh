#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm, surviving preemption: sbatch scripts/slurm.sh
#SBATCH --job-name=dynamicvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out
set -eu

# SIGTERM (of a preemption, or two minutes before the time limit) makes every process save and stop. A preempted
# job is requeued and resumes by itself (--resume auto); after the time limit, submit this file again.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun kills what has not stopped 30 seconds after a signal, unless newer versions are told otherwise with
# --shutdown-timeout. Where gloo picks a wrong network: export GLOO_SOCKET_IFNAME=eth0 (the interface's name).
# Since Slurm 22.05, srun does not inherit --cpus-per-task, and the eight processes would share one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
  --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head_node:29400" \
  main_dynamic_vit.py --arch deit_small --distill --base_rate 0.7 --epochs 30 \
  --batch-size 48 --dist-eval --data-path "${DATA:-/path/to/ILSVRC2012}" \
  --output_dir "logs/dynamic-vit_deit-small"
